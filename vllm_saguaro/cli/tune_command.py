"""`vllm-saguaro tune`: the K, N, C, backup and placement that are best on this machine, measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_saguaro.cli.doctor_command import platform, stdout_kept
from vllm_saguaro.cli.other_placements import other_placements
from vllm_saguaro.cli.usage import UsageError
from vllm_saguaro.cli.writing import check_file, check_picture

if TYPE_CHECKING:
    from vllm_saguaro.tuned import MadeFor
    from vllm_saguaro.tuning.found import Tuning
    from vllm_saguaro.tuning.settings import Settings

OUTPUT = "saguaro-tuned.json"
SPECULATION = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens")
"""Options of vLLM, each with a value; the first also with dots."""
EXAMPLES = """examples:
  vllm-saguaro tune assets/pair/target --quick -- --dtype float32 --kv-cache-memory-bytes 1073741824
  vllm-saguaro tune TARGET DRAFT --prompt-file PROMPTS.jsonl --picture tuned.png -- --max-num-seqs 64
  vllm-saguaro tune TARGET DRAFT --batch 1 8 --temperature 0.7 --k 3 4 5 6
  vllm-saguaro tune TARGET -- --speculative-config '{"method": "saguaro", "draft_cpus": "6-7"}'
  vllm serve TARGET --speculative-config '{"method": "saguaro", "tuned": "saguaro-tuned.json"}'

After -- stands what `vllm serve` would get; keys of a speculative config there stay as they are. Each engine runs in a
process of its own, one after the other, with nothing else beside it: leave the machine alone meanwhile. Of placements
those are tried that this machine allows, "ray" where RAY_ADDRESS names a cluster. What was not tried is named.
exit codes: 0 measured and written; 1 an engine could not be started or a file not written; 2 the question was wrong;
130 stopped"""


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "tune",
        help="which K, N, backup and placement are best here",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("target", metavar="TARGET", help="the target's folder or hub name")
    command.add_argument("draft", nargs="?", metavar="DRAFT", help="the draft's; chosen as in a start if left out")
    load = command.add_argument_group("the load")
    load.add_argument("--batch", nargs="+", type=int, help="requests at once (default: 1 4 16; see --max-num-seqs)")
    load.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], help="(default: 0 1)")
    load.add_argument(
        "--prompt-file",
        "--prompts",
        dest="prompts",
        type=Path,
        metavar="JSONL",
        help='lines of {"prompt": "..."} (default: prompts.jsonl beside the target\'s folder, else eight built in)',
    )
    load.add_argument("--tokens", type=int, help="new tokens of each prompt (default: 64, quick: 48)")
    search = command.add_argument_group("the search")
    search.add_argument("--k", nargs="+", type=int, help="drafts a round to consider (default: 1 2 3 4 6 8)")
    search.add_argument("--minutes", type=float, help="after which no engine is started (default: 10, quick: 3)")
    search.add_argument("--quick", action="store_true", help="batches of 1 and 4, one repetition, three minutes")
    answer = command.add_argument_group("the answer")
    answer.add_argument("--output", type=Path, default=Path(OUTPUT), metavar="JSON", help="(default: %(default)s)")
    answer.add_argument("--picture", type=Path, metavar="PNG", help="tokens a second by K and N (or .svg)")
    answer.add_argument("--json", action="store_true", help="what is written, on standard output too, instead of lines")
    command.set_defaults(run=run)


@dataclass(frozen=True)
class Question:
    """What is to be tuned, as a start would be, and what the file will be good for."""

    settings: Settings
    made_for: MadeFor
    draft_is_own: bool


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print."""
    from vllm_saguaro.benchmark import provenance
    from vllm_saguaro.benchmark.client import WorkerError
    from vllm_saguaro.benchmark.progress import Progress, ProgressBar
    from vllm_saguaro.tuning import document, plots
    from vllm_saguaro.tuning.session import tune
    from vllm_saguaro.tuning.settings import TuningError

    if arguments.picture is not None:
        check_picture("tune", "--picture", arguments.picture)
    check_file("tune", "--output", arguments.output)
    try:
        with environment_kept(), stdout_kept():
            question = ask(arguments)
        about = provenance.collect(question.settings.cores)
        found = tune(question.settings, ProgressBar() if sys.stderr.isatty() else Progress())
    except TuningError as error:
        raise UsageError(f"tune: {error}") from error
    except WorkerError as error:
        print(f"vllm-saguaro: tune: an engine did not run: {error}", file=sys.stderr)
        return 1
    about["command"] = f"vllm-saguaro {shlex.join(arguments.words)}"
    found.notes += provenance.warnings(about)
    data = document.document(found, question.made_for, about, question.draft_is_own)
    try:
        document.write(data, arguments.output)
    except OSError as error:
        print(f"vllm-saguaro: tune: the file was not written, here is what it would hold: {error}", file=sys.stderr)
        print(json.dumps(data, indent=1))
        return 1
    code = 0
    if arguments.picture is not None:
        try:
            plots.plot(found, arguments.picture)
        except OSError as error:
            print(f"vllm-saguaro: tune: the picture was not written: {error}", file=sys.stderr)
            arguments.picture, code = None, 1
    print(json.dumps(data, indent=1) if arguments.json else as_text(found, data, arguments))
    return code


def ask(arguments: argparse.Namespace) -> Question:
    """What a start with these words would be. Raises UsageError or TuningError for what cannot be measured."""
    from vllm_saguaro.config import SaguaroConfigError
    from vllm_saguaro.tuning import settings
    from vllm_saguaro.vllm_hooks import served_engine
    from vllm_saguaro.vllm_hooks.dry_run import dry_run, plugin_is_loaded
    from vllm_saguaro.vllm_hooks.tuned_file import served_here

    if not plugin_is_loaded():
        raise UsageError("tune: vLLM does not load the plugin: see vllm-saguaro doctor")
    words, quick = arguments.vllm_words, arguments.quick
    try:
        start = dry_run(arguments.target, arguments.draft, words)
        fixed = served_engine.written_speculation(arguments.target, words)
        host, _ = platform()
    except SaguaroConfigError as problem:
        raise UsageError(f"tune: {problem}") from problem
    except SystemExit as stop:
        raise UsageError("tune: vLLM does not know the options after -- (see above)") from stop
    if start.config.tuned is not None:
        raise UsageError("tune: the speculative config after -- names a tuned file: leave it out, it is to be made")
    named = fixed.pop("model", arguments.draft)
    usual = start.config.placement
    placements, left_out = other_placements(host, usual, fixed, os.environ.get("RAY_ADDRESS"))
    settings.refuse_ranks(start.ranks)
    asked = any(word.partition("=")[0].replace("_", "-") == "--max-num-seqs" for word in words)
    batches = arguments.batch or settings.default_batches(start.max_num_seqs, asked, quick)
    settings.check_loads(batches, arguments.temperature, start.max_num_seqs)
    ks = settings.check_ks(
        [fixed["num_speculative_tokens"]] if "num_speculative_tokens" in fixed else arguments.k or settings.USUAL_KS
    )
    tokens = arguments.tokens or (48 if quick else 64)
    room = settings.room_for_prompts(start.target_length, tokens, max(ks))
    minutes = arguments.minutes or (settings.QUICK_MINUTES if quick else settings.MINUTES)
    return Question(
        settings.Settings(
            target=arguments.target,
            draft=start.draft,
            words=tuple(words),
            fixed=fixed,
            batches=tuple(sorted(set(batches))),
            temperatures=tuple(sorted(set(arguments.temperature))),
            ks=ks,
            prompts=settings.enough(settings.read_prompts(arguments.prompts, arguments.target), max(3, *batches)),
            prompt_tokens=room,
            tokens=tokens,
            repetitions=1 if quick else 2,
            seconds=60 * minutes,
            on_host=not host.on_v2,
            usual_placement=usual,
            placements=placements,
            placements_left_out=left_out,
            offline=start.target_folder is not None and start.draft_folder is not None,
            cores=tuple(sorted(os.sched_getaffinity(0))),
        ),
        served_here(start.target, start.draft, start.dtype),
        draft_is_own=named is None,
    )


def as_text(found: Tuning, data: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """What was found, for a person."""
    from vllm_saguaro.tuning import document

    lines = [document.table(found), ""]
    lines += [f"not tried: {name} ({why})" for name, why in found.left_out.items()]
    lines += [f"note: {note}" for note in found.notes]
    lines.append(f"choice: {json.dumps(data['choice'])}")
    lines.append(_verdict(data, found.chosen.candidate.name))
    for each in data["by_batch"]:
        lines.append(f"fastest at {each['batch']} at once: {each['fastest']}")
    config = {"method": "saguaro", **found.settings.fixed, "tuned": str(arguments.output)}
    words = ["vllm", "serve", arguments.target, *without_speculation(found.settings.words)]
    lines += [
        f"written to {arguments.output}" + (f" and {arguments.picture}" if arguments.picture else ""),
        shlex.join([*words, "--speculative-config", json.dumps(config)]),
    ]
    return "\n".join(lines)


def without_speculation(words: Sequence[str]) -> list[str]:
    """The words of a server that say nothing of its speculative config, however that is written."""
    left: list[str] = []
    value_follows = False
    for word in words:
        if value_follows:
            value_follows = False
            continue
        option, is_whole, _ = word.partition("=")
        if option.replace("_", "-").partition(".")[0] in SPECULATION:
            value_follows = not is_whole
        else:
            left.append(word)
    return left


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """vLLM and our core plan write into the environment of this process: the engines begin with the one it had."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _verdict(data: Mapping[str, Any], chosen: str) -> str:
    """Which method is the fastest over all loads, and by how much: saguaro as chosen, the others with their best."""
    from vllm_saguaro.tuning.candidates import MARGIN, SAGUARO

    best: dict[str, float] = {}
    for each in data["measured"]:
        if each["method"] != SAGUARO or each["name"] == chosen:
            best[each["method"]] = max(best.get(each["method"], 0.0), each["gain_over_plain"])
    gains = ", ".join(f"{method} {value:.2f}" for method, value in best.items()) + " times plain"
    others = max(value for method, value in best.items() if method != SAGUARO)
    if data["recommended"] == SAGUARO:
        little = f", by less than {MARGIN:.0%}" if best[SAGUARO] < others * (1 + MARGIN) else ""
        return f"saguaro is the fastest{little}: {gains}"
    name = {"plain": "plain vLLM"}.get(data["recommended"], f"method {data['recommended']}")
    return f"{name} is faster than saguaro here: {gains}. Leave saguaro off for this load."
