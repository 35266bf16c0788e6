"""`vllm-saguaro doctor`: will it run here, with these models, and what to do where it will not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm_saguaro.cli import installation
from vllm_saguaro.cli.finding import Finding, Level, as_text, error, ok, refused
from vllm_saguaro.cli.usage import UsageError

EXAMPLES = """examples:
  vllm-saguaro doctor                                     the installation and the machine
  vllm-saguaro doctor Qwen/Qwen3-8B                       a target, and the draft that would be chosen for it
  vllm-saguaro doctor ./target ./draft -- --dtype float32 --max-model-len 4096 --tensor-parallel-size 2
  vllm-saguaro doctor ./target -- --speculative-config '{"method": "saguaro", "placement": "ray"}'

After -- stands what `vllm serve` would get. Nothing is loaded: only configurations, tokenizers and the headers of
safetensors files are read.
exit codes: 0 it will run (there may be warnings); 1 it will not; 2 the question was wrong"""


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "doctor",
        help="will it run here, with these models",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("target", nargs="?", metavar="TARGET", help="the target's folder or hub name")
    command.add_argument("draft", nargs="?", metavar="DRAFT", help="the draft's; chosen as in a start if left out")
    command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if one is an error."""
    if arguments.vllm_words and arguments.target is None:
        raise UsageError("doctor: what follows -- goes with a TARGET: vllm-saguaro doctor TARGET [DRAFT] -- ...")
    with _stdout_kept():
        findings = examine(arguments.target, arguments.draft, arguments.vllm_words)
    levels = [finding.level for finding in findings]
    bad = Level.ERROR in levels
    if arguments.json:
        print(json.dumps({"ok": not bad, "findings": [finding.to_json() for finding in findings]}, indent=1))
    else:
        print(as_text(findings))
        counted = ", ".join(f"{levels.count(level)} {level.value}" for level in Level)
        print(f"\n{counted}: " + ("it will not run like this" if bad else "it will run"))
    return int(bad)


def examine(target: str | None, draft: str | None, words: list[str]) -> list[Finding]:
    """Everything, in the order in which a start would meet it. What an error makes pointless is left out."""
    findings = [installation.versions(), *installation.plugin(), *installation.gpus()]
    if any(finding.level is Level.ERROR for finding in findings[:1]):
        return [*findings, installation.plan_now()]
    findings += vllm_itself()
    if target is None or any(finding.level is Level.ERROR for finding in findings):
        return [*findings, installation.plan_now(), *placements()]
    return [*findings, *placements(), *pair(target, draft, words)]


def vllm_itself() -> list[Finding]:
    """The vLLM that is installed: its version, its platform, its seams, and whether it loads us."""
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.vllm_hooks import compatibility

    findings: list[Finding] = []
    try:
        compatibility.check_version()
        for where in (compatibility.FRONTEND, compatibility.WORKER):
            compatibility.check_seams(where)
        seams = len(compatibility.SEAMS)
        findings.append(ok("vllm", f"{compatibility.SUPPORTED_RANGE} go with it, all {seams} seams are as known"))
    except SaguaroConfigError as problem:
        return [refused("vllm", str(problem))]
    except ImportError as problem:
        return [error("vllm", f"it cannot be imported ({compatibility.one_line(problem)})", "install vLLM anew")]
    try:
        compatibility.check_platform()
        findings.append(ok("platform", "vLLM's CPU backend, model runner V1"))
    except SaguaroConfigError as problem:
        findings.append(refused("platform", str(problem)))
    from vllm_saguaro.vllm_hooks.dry_run import plugin_is_loaded

    if plugin_is_loaded():
        findings.append(ok("plugin", "vLLM loads it"))
    else:
        findings.append(error("plugin", "vLLM has not loaded it", "look into vLLM's log with VLLM_LOGGING_LEVEL=DEBUG"))
    return findings


def placements() -> list[Finding]:
    """Where a draft could run."""
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.vllm_hooks import compatibility

    try:
        compatibility.check_placement("ray")
        return [ok("placement", f"process, inline, ray (Ray {installation.version_of('ray')})")]
    except SaguaroConfigError as problem:
        return [ok("placement", f"process, inline; not ray: {problem}")]


def pair(target: str, draft: str | None, words: list[str]) -> list[Finding]:
    """A start with these models, up to the weights."""
    from vllm_saguaro.cli.model_pair import findings_of
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.vllm_hooks.dry_run import dry_run

    try:
        start = dry_run(target, draft, words)
    except SaguaroConfigError as problem:
        return [refused("start", str(problem))]
    except SystemExit as stop:
        raise UsageError("doctor: vLLM does not know the options after -- (see above)") from stop
    return findings_of(start)


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """vLLM logs to stdout as soon as it is imported; ours is for the answer alone."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        yield
