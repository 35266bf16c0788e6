"""How each command of README and docs is run by a test; where it cannot be, why, and what is looked at instead.

The first way whose pattern fits a command is its way. A command without one fails test_doc_ways.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from tests.unit.docs.doc_shell import Shown

HELD = "assets/pair"
"""The committed pair stands for the models that pages leave open."""


class Cost(Enum):
    """When it runs: always, with the tests marked slow, with those marked long."""

    QUICK = auto()
    SLOW = auto()
    LONG = auto()


@dataclass(frozen=True)
class Runs:
    """Run as it is shown, but for `MODEL` and the like, and with `less` behind it: the last value of an option counts.

    `says`: what must be in its output (standard error included). `interrupted`: it goes on until Ctrl-C, which it gets
    once it has said that. `repeats`: the page shows its output to the letter. `asks`: it needs servers. `elsewhere`:
    it runs in a copy of the repository, since it leaves something there.
    """

    pattern: str
    cost: Cost
    less: str = ""
    says: str = ""
    interrupted: bool = False
    repeats: bool = False
    asks: bool = False
    elsewhere: bool = False


@dataclass(frozen=True)
class Serves:
    """A server: started, asked for a text and for its metrics, and ended."""

    pattern: str
    less: str
    speculates: bool = True


@dataclass(frozen=True)
class Cannot:
    """Not run here, for this reason. Its words are understood by the real parser all the same (test_doc_commands.py);
    `instead` is a test that does more than that."""

    pattern: str
    because: str
    instead: str = ""


Way = Runs | Serves | Cannot

SMALL_SERVER = (
    "--port {port} --dtype float32 --kv-cache-memory-bytes 268435456 --max-num-seqs 4 --max-model-len 512 "
    "--enforce-eager"
)
SMALL_BENCH = (
    "--target-layers 6 --draft-layers 3 --k 2 --branches 6 --batch 1 --temperature 0 --top-p 1 --prompts 1 --tokens 8 "
    "--repetitions 1 --eager --output {folder}/x.json"
)
EXAMPLES = "tests/unit/examples/test_examples.py"
ON_A_CPU = "tests/unit/scripts/test_gpu_check.py::test_everything_that_a_cpu_can_show_is_shown"
NO_MODEL = "models of billions of parameters, from a hub"

WAYS: tuple[Way, ...] = (
    # scripts/bench.py, vllm-saguaro bench
    Runs(r"python scripts/bench\.py plot .*", Cost.QUICK, "--plot {folder}/x.png", r"written to \S+x\.png"),
    Runs(r"python scripts/bench\.py compare .*", Cost.QUICK, says=r"B / A"),
    Runs(r"python scripts/bench\.py curve .*", Cost.LONG, f"{SMALL_BENCH} --depths 6:3", r"target:draft layers"),
    Runs(r"python scripts/bench\.py --.*", Cost.LONG, SMALL_BENCH, r"== batch 1, T=0"),
    Runs(
        r"vllm-saguaro bench --against-server .*",
        Cost.LONG,
        "--concurrency 1 --temperature 0 --prompts 2 --tokens 8 --repetitions 1 --output {folder}/x.json",
        r"saguaro +\d+\.\d",
        asks=True,
    ),
    Runs(r"vllm-saguaro bench --target .*", Cost.LONG, SMALL_BENCH, r"== batch 1, T=0"),
    Cannot(
        r"(?:taskset -c 1 )?ray start .*|RAY_ADDRESS=\S+ python scripts/bench\.py .*",
        "two nodes of a Ray cluster, which stay",
        "tests/e2e/test_ray.py::test_a_draft_on_another_node_gives_the_plain_text_over_the_network",
    ),
    # the rest of the command
    Runs(r"vllm-saguaro doctor .* -- .*", Cost.LONG, says=r"0 error: it will run"),
    # Without it vLLM wants nearly all memory, and whether so much is free is the machine's affair.
    Runs(r"vllm-saguaro doctor .*", Cost.SLOW, "-- --kv-cache-memory-bytes 268435456", r"0 error: it will run"),
    Runs(r"vllm-saguaro simulate", Cost.QUICK, repeats=True),
    Runs(r"vllm-saguaro simulate --world llama-70b", Cost.QUICK, says=r"ours +\d"),
    Runs(
        r"vllm-saguaro simulate --sweep all .*",
        Cost.SLOW,
        "--plot {folder}/x.png --tokens 16 --requests 2",
        r"c, drafting over verify pass",
    ),
    # Half a minute, and tests/unit/cli/test_simulate_command.py asks it of all reports.
    Runs(r"vllm-saguaro simulate --validate .*", Cost.LONG, says=r"\| "),
    Runs(r"vllm-saguaro watch \S+ --once", Cost.LONG, says=r"hit rate +\[", asks=True),
    Cannot(
        r"vllm-saguaro watch \S+ --web.*",
        "a page, for a browser",
        "tests/unit/cli/test_watch_page.py::test_the_command_prints_where_the_page_is_outlives_the_server_and_ends_with_130",
    ),
    Runs(r"vllm-saguaro watch \S+", Cost.LONG, says=r"hit rate +\[", interrupted=True, asks=True),
    Cannot(
        r"vllm-saguaro tune .*",
        "ten minutes of engines, one after the other",
        "tests/e2e/test_tune.py::test_the_file_has_what_was_measured",
    ),
    Cannot(
        r"vllm serve \S+ .*\"tuned\".*",
        "the file that the command before it writes",
        "tests/e2e/test_tune.py::test_an_engine_that_starts_with_it_gives_plain_texts",
    ),
    # servers and those who ask them
    Serves(r"scripts/demo\.sh --serve", "--port {port}"),
    Serves(r"examples/server\.sh", SMALL_SERVER),
    Cannot(
        r"vllm serve MODEL .*draft_pool.*",
        "a Ray cluster",
        "tests/e2e/test_draft_pool.py::test_both_have_the_plain_text_and_hits",
    ),
    Cannot(
        r"vllm serve MODEL .*(?:draft_node|\"address\").*",
        "a Ray cluster with resources of that name",
        "tests/e2e/test_ray.py::test_a_draft_on_another_node_gives_the_plain_text_over_the_network",
    ),
    Serves(r"vllm serve MODEL(?: --port 8000)?", SMALL_SERVER, speculates=False),
    Serves(r"vllm serve MODEL .*--speculative-config .*", SMALL_SERVER),
    Runs(r"curl -s http://localhost:8000/metrics \| grep .*", Cost.LONG, says=r"vllm:saguaro_hits_total", asks=True),
    Runs(
        r"python examples/client\.py",
        Cost.LONG,
        "--url {saguaro} --max-tokens 16",
        r"outcomes were predicted",
        asks=True,
    ),
    Runs(r"\.venv/bin/python examples/offline\.py", Cost.LONG),
    Cannot(r".*Qwen/.*", NO_MODEL, f"{EXAMPLES}::test_the_server_is_started_as_asked"),
    Cannot(
        r"examples/ray_cluster\.sh .*",
        "a Ray cluster of several nodes",
        f"{EXAMPLES}::test_the_draft_goes_to_its_node_of_the_cluster",
    ),
    Cannot(
        r"docker .*",
        "no Docker",
        f"{EXAMPLES}::test_the_image_is_made_of_files_that_are_there",
    ),
    Cannot(r"kubectl .*", "no Kubernetes", f"{EXAMPLES}::test_the_manifests_belong_together"),
    # other scripts
    Runs(r"scripts/demo\.sh", Cost.LONG, f"{SMALL_BENCH}", r"same text"),
    Cannot(r"scripts/test\.sh", "it would run this test again"),
    Runs(r"python scripts/pictures\.py", Cost.SLOW, "--output {folder}"),
    Runs(
        r"python scripts/faults\.py.*",
        Cost.LONG,
        "--placement process --only kill --seconds 3 --concurrency 2 --output {folder}/x.json",
        r"kill",
    ),
    Runs(
        r"python scripts/soak\.py .*",
        Cost.LONG,
        "--requests 60 --kills 1 --faults stop=1 --warm-up 8 --concurrency 4 --state {folder}/x.jsonl "
        "--report {folder}/x.json",
    ),
    Cannot(
        r"python scripts/gpu_check\.py --cpu",
        "the same, smaller, is a test of its own",
        ON_A_CPU,
    ),
    Cannot(
        r"python scripts/gpu_check\.py.*",
        "no GPU",
        ON_A_CPU,
    ),
    # installation
    Runs(
        r'pip install "?\.(?:\[\w+\])?"?',
        Cost.SLOW,
        "--no-deps --no-build-isolation --no-index --target {folder}/site",
        r"Successfully installed vllm-saguaro",
        elsewhere=True,
    ),
    Cannot(
        r"mkdocs serve",
        "it serves until it is stopped; the site itself is built where MkDocs is installed",
        "tests/unit/docs/test_doc_site.py::test_the_site_builds_without_a_warning",
    ),
)

PLACEHOLDERS = {
    r"(?<!\S)(?:MODEL|TARGET|TARGET_FOLDER)(?!\S)": f"{HELD}/target",
    r"(?<!\S)(?:DRAFT|DRAFT_FOLDER)(?!\S)": f"{HELD}/target/draft",
    r'"DRAFT"': f'"{HELD}/target/draft"',
    r"(?<!\S)(?:PROMPTS|prompts)\.jsonl(?!\S)": f"{HELD}/prompts.jsonl",
    r"(?<!\S)question\.jsonl(?!\S)": "{folder}/question.jsonl",
    r"results/before\.json": "docs/results/headline_12_4.json",
    r"results/after\.json": "docs/results/headline_12_6.json",
    r"(?<!\S)\.venv/bin/python": "python",
    r"--sweep (\w+)=([^,\s]+),\S+": r"--sweep \1=\2",
    r"plain=http://localhost:8000": "plain={plain}",
    r"http://localhost:800[01]": "{saguaro}",
}
"""What stands for what a page leaves open; of a sweep the first value alone."""


def way_of(text: str) -> Way | None:
    """The way of a command."""
    return next((way for way in WAYS if re.fullmatch(way.pattern, text, re.DOTALL)), None)


def line_of(command: Shown, way: Runs | Serves, **values: str) -> str:
    """What is given to the shell. A value is a folder, a port, the address of a server."""
    text = command.text
    for pattern, value in PLACEHOLDERS.items():
        text = re.sub(pattern, value, text)
    text = f"{text} {way.less}".strip()
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def once(commands: list[Shown]) -> list[Shown]:
    """Each command once, wherever it stands again; the one with its output shown, if there is one."""
    found: dict[str, Shown] = {}
    for command in commands:
        if command.text not in found or command.output:
            found[command.text] = command
    return list(found.values())
