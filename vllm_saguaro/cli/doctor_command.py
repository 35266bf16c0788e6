"""`vllm-saguaro doctor`: will it run here, with these models, and what to do where it will not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm_saguaro import cores
from vllm_saguaro.cli import installation
from vllm_saguaro.cli.finding import Finding, Level, as_text, error, ok, refused, warning
from vllm_saguaro.cli.placements import Host, RayHere, placements
from vllm_saguaro.cli.usage import UsageError

EXAMPLES = """examples:
  vllm-saguaro doctor                                     the installation and the machine
  vllm-saguaro doctor Qwen/Qwen3-8B                       a target, and the draft that would be chosen for it
  vllm-saguaro doctor ./target ./draft -- --dtype float32 --max-model-len 4096 --tensor-parallel-size 2
  vllm-saguaro doctor ./target -- --speculative-config '{"method": "saguaro", "placement": "ray"}'

After -- stands what `vllm serve` would get. Nothing is loaded: only configurations, tokenizers and the headers of
safetensors files are read.
exit codes: 0 it will run (there may be warnings); 1 it will not; 2 the question was wrong; 130 stopped"""


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
    with stdout_kept():
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
    findings = [installation.versions(), *installation.plugin()]
    if any(finding.level is Level.ERROR for finding in findings[:1]):
        return [*findings, installation.plan_now()]
    about, host = vllm_itself()
    findings += about
    if host is None:
        return [*findings, installation.plan_now()]
    findings += installation.gpus(None if host.on_cpu else host.gpus)
    place = placement(host)
    if target is None or any(finding.level is Level.ERROR for finding in (*findings, place)):
        plan = [] if host.on_v2 else [installation.plan_now()]  # by default a draft has no cores of its own there
        return [*findings, *plan, place]
    return [*findings, place, *pair(target, draft, words)]


def vllm_itself() -> tuple[list[Finding], Host | None]:
    """The vLLM that is installed: version, platform, seams, and whether it loads us. No `Host` where it is refused."""
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.vllm_hooks import compatibility

    findings: list[Finding] = []
    try:
        compatibility.check_version()
        compatibility.check_seams(compatibility.FRONTEND)
        host: Host | None = None
        try:
            host, found = platform()
        except SaguaroConfigError as problem:
            found = refused("platform", str(problem))
        used = [compatibility.FRONTEND]
        if host is not None:
            used.append(compatibility.DEVICE_WORKER if host.on_v2 else compatibility.WORKER)
            compatibility.check_seams(used[-1])
        seams = sum(seam.where in used for seam in compatibility.SEAMS)
        findings += [ok("vllm", f"{compatibility.SUPPORTED_RANGE} go with it, its {seams} seams are as known"), found]
    except SaguaroConfigError as problem:
        return [refused("vllm", str(problem))], None
    except ImportError as problem:
        return [error("vllm", f"it cannot be imported ({compatibility.one_line(problem)})", "install vLLM anew")], None
    from vllm_saguaro.vllm_hooks.dry_run import plugin_is_loaded

    if plugin_is_loaded():
        findings.append(ok("plugin", "vLLM loads it"))
    else:
        findings.append(error("plugin", "vLLM has not loaded it", "look into vLLM's log with VLLM_LOGGING_LEVEL=DEBUG"))
    return findings, host


def platform() -> tuple[Host, Finding]:
    """What vLLM computes on, and with which model runner. Raises SaguaroConfigError for what is refused."""
    from vllm.platforms import current_platform

    from vllm_saguaro.vllm_hooks import compatibility

    on_cpu = current_platform.is_cpu()
    on_v2 = compatibility.check_platform() is compatibility.Runner.V2
    host = Host(on_cpu, on_v2, gpus=0 if on_cpu else current_platform.device_count())
    if not host.on_v2:
        return host, ok("platform", "vLLM's CPU backend, model runner V1")
    where = "vLLM's CPU backend" if host.on_cpu else "CUDA"
    return host, warning(
        "platform",
        f"{where}, model runner V2: that path is tested without a GPU only, no GPU has run this release",
        "set VLLM_USE_V2_MODEL_RUNNER=0 to be fast" if host.on_cpu else "run scripts/gpu_check.py before relying on it",
    )


def placement(host: Host) -> Finding:
    """Where a draft could run, on the machine as it is."""
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.vllm_hooks import compatibility

    try:
        compatibility.check_placement("ray")
        problem = ""
    except SaguaroConfigError as refusal:
        problem = str(refusal)
    ray = RayHere(installation.version_of("ray"), problem)
    return placements(host, len(cores.one_cpu_a_core(cores.allowed_cpus())), ray)


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
def stdout_kept() -> Iterator[None]:
    """vLLM logs to stdout as soon as it is imported; ours is for the answer alone."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        yield
