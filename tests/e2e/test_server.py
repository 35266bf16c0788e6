"""`vllm serve MODEL --speculative-config saguaro`: streams, metrics, and an end that leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from scripts.soaking.server import free_port
from tests.e2e import plans
from tests.e2e.conftest import Plain
from tests.e2e.harness import OF_SERVERS, TARGET, environment_at_start, is_gone_within, prompts
from tests.e2e.shared_names import names_in_shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = 4
START_SECONDS = 120


@dataclass
class Served:
    """What the clients of one server got, and what was left of it when it had ended."""

    texts: list[str]
    pieces: list[int]
    metrics: str
    status: int
    seconds_to_end: float
    processes: list[int]
    left_running: list[int]
    memory_left: set[str]
    log: str


def stream(url: str, prompt: str) -> tuple[str, int]:
    """The text of one streamed completion, and in how many pieces it came."""
    asked = {"model": "pair", "prompt": prompt, "max_tokens": plans.TOKENS, "temperature": 0}
    asked |= {"stream": True, "ignore_eos": True}
    pieces = []
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                pieces += [choice["text"] for choice in json.loads(data)["choices"]]
    return "".join(pieces), len(pieces)


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not come up:\n{log.read_text(errors='replace')[-6000:]}")


def descendants(pid: int) -> list[int]:
    """The process and all that it started, as of now."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def without_vllms_own_end(log: str) -> str:
    """
    A server's log without what vLLM itself logs at an end on a busy machine.

    vLLM (v1/engine/core_client.py, 0.32) ends its client in a thread; where the event loop has not cancelled the
    handler of outputs meanwhile, that handler logs the end it was told of as an `EngineDeadError`. Plain vLLM does too.
    """
    before, start, after = log.partition("[shutdown] MPClient: start")
    own = r"^.*AsyncLLM output_handler failed\.\n(?:.*async_llm\.py:\d+\].*\n)+?.*EngineDeadError: .*\n"
    return before + start + re.sub(own, "", after, count=1, flags=re.MULTILINE)


def serve(how: signal.Signals, folder: Path) -> Served:
    url = f"http://127.0.0.1:{(port := free_port())}"
    log = folder / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TARGET)),
                *("--speculative-config", "saguaro", "--served-model-name", "pair"),
                *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
                *("--kv-cache-memory-bytes", str(192 << 20), "--host", "127.0.0.1", "--port", str(port)),
            ],
            stdout=file,
            stderr=file,
            env={**environment_at_start(), **OF_SERVERS},
        )
    processes = [server.pid]
    with names_in_shared_memory() as names:
        try:
            wait_until_up(url, server, log)
            processes = descendants(server.pid)
            with ThreadPoolExecutor(CLIENTS) as pool:
                streams = list(pool.map(lambda prompt: stream(url, prompt), prompts()[: 3 * CLIENTS]))
            metrics = httpx.get(f"{url}/metrics").text
            started = time.monotonic()
            server.send_signal(how)
            status = server.wait(30)
            took = time.monotonic() - started
            left = [pid for pid in processes if not is_gone_within(pid, 3)]
        finally:
            for pid in processes:
                if not is_gone_within(pid, 0):
                    os.kill(pid, signal.SIGKILL)
    texts, pieces = zip(*streams, strict=True)
    return Served(list(texts), list(pieces), metrics, status, took, processes, left, names.left(), log.read_text())


ENDS = [pytest.param(signal.SIGINT, id="SIGINT"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=ENDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(request.param, tmp_path_factory.mktemp("server"))


def test_streamed_texts_are_plain_vllms(served: Served, plain: Plain) -> None:
    expected = [result["outputs"][0]["text"] for result in plain.default["greedy, batch 8"].results]
    assert served.texts == expected[: len(served.texts)]


def test_texts_come_in_pieces_of_several_tokens(served: Served) -> None:
    # How many tokens a piece holds depends on how much of the machine the draft gets; that some hold several does not.
    assert all(1 < pieces <= plans.TOKENS for pieces in served.pieces)
    assert sum(served.pieces) < len(served.pieces) * plans.TOKENS


def test_metrics_of_the_server_have_ours(served: Served) -> None:
    def value(name: str, *labels: str) -> float:
        lines = [line for line in served.metrics.splitlines() if line.startswith(name + "{")]
        (line,) = [line for line in lines if all(label in line for label in labels)]
        assert 'model_name="pair"' in line
        return float(line.rpartition(" ")[2])

    assert value("vllm:saguaro_hits_total") > 0
    assert value("vllm:saguaro_misses_total", 'cause="not_predicted"') > 0
    assert value("vllm:saguaro_misses_total", 'cause="late"') >= 0
    assert value("vllm:saguaro_misses_total", 'cause="absent"') >= 0
    assert value("vllm:saguaro_late_tables_total") >= 0
    for name in ("draft_round", "target_wait", "verify"):
        assert value(f"vllm:saguaro_{name}_seconds_count") > 0
        assert value(f"vllm:saguaro_{name}_seconds_bucket", 'le="+Inf"') > 0
    assert value("vllm:spec_decode_num_drafts_total") > 0
    assert value("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_the_server_says_which_draft_and_which_cores(served: Served) -> None:
    assert re.search(r"saguaro drafts with .*draft", served.log)
    assert re.search(r"target .*cores? .*draft", served.log)


def test_a_signal_ends_the_server_and_all_it_started(served: Served) -> None:
    assert served.status == 0
    assert len(served.processes) >= 3  # the server, the engine and the draft
    assert served.left_running == []
    assert served.memory_left == set()
    assert served.seconds_to_end < 20
    assert "Traceback" not in without_vllms_own_end(served.log)
