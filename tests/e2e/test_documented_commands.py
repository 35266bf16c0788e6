"""Commands of README and docs that start an engine: run for real, with small limits (tests/unit/docs/doc_ways.py)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.soaking.server import free_port
from tests.e2e.harness import ROOT
from tests.unit.docs.doc_shell import Shown, shown
from tests.unit.docs.doc_shells import SECONDS, begin, end, run
from tests.unit.docs.doc_ways import Cost, Runs, Serves, line_of, once, way_of

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]  # an hour: some seventy engines are loaded

COMMANDS = once(shown())
SERVERS = [each for each in COMMANDS if isinstance(way_of(each.text), Serves)]
PLAIN = "vllm serve MODEL --port 8000"
SAGUARO = "vllm serve MODEL --speculative-config saguaro"


def of_the_long(asks: bool) -> list[Shown]:
    found = []
    for command in COMMANDS:
        way = way_of(command.text)
        if isinstance(way, Runs) and way.cost is Cost.LONG and way.asks is asks:
            found.append(command)
    return found


def is_named(command: Shown) -> str:
    return command.text[:80]


@contextlib.contextmanager
def served(command: Shown) -> Iterator[str]:
    """The address of a server that a command has started; it ends well with the block."""
    way = way_of(command.text)
    assert isinstance(way, Serves)
    port = str(free_port())
    with tempfile.TemporaryFile("w+") as log:
        process = begin(f"exec {line_of(command, way, port=port)}", log)
        try:
            url = f"http://localhost:{port}"
            _wait(process, url, log.fileno())
            yield url
        finally:
            end(process)


def _wait(process: subprocess.Popen[str], url: str, log: int) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(1)
    text = Path(f"/proc/self/fd/{log}").read_text(errors="replace")
    raise AssertionError(f"no server came up at {url}:\n{text[-6000:]}")


def completed(url: str) -> str:
    model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    asked = {"model": model, "prompt": "def read_lines(path):\n", "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=300)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Plain vLLM and saguaro, started as the pages say."""
    by_text = {command.text: command for command in SERVERS}
    with served(by_text[PLAIN]) as plain, served(by_text[SAGUARO]) as saguaro:
        assert completed(plain) == completed(saguaro)
        yield {"plain": plain, "saguaro": saguaro}


@pytest.mark.parametrize("command", of_the_long(asks=True), ids=is_named)
def test_a_command_that_asks_a_server(command: Shown, servers: dict[str, str], tmp_path: Path) -> None:
    way = way_of(command.text)
    assert isinstance(way, Runs)
    run(command, way, tmp_path, **servers)
    if "bench" in command.text:
        report = json.loads((tmp_path / "x.json").read_text())
        assert report["summaries"]["saguaro, 1 at once, T=0"]["same_text"] == [2, 2]


@pytest.mark.parametrize("command", [each for each in SERVERS if each.text not in (PLAIN, SAGUARO)], ids=is_named)
def test_a_server_starts_answers_and_counts(command: Shown) -> None:
    way = way_of(command.text)
    assert isinstance(way, Serves)
    if command.text.startswith("scripts/demo.sh"):
        skip_unless_installed()
    with served(command) as url:
        assert completed(url)
        assert ("vllm:saguaro_hits_total" in httpx.get(f"{url}/metrics", timeout=60).text) == way.speculates


@pytest.mark.parametrize("command", of_the_long(asks=False), ids=is_named)
def test_a_command_that_loads_engines(command: Shown, tmp_path: Path) -> None:
    way = way_of(command.text)
    assert isinstance(way, Runs)
    if command.text.startswith("scripts/demo.sh"):
        skip_unless_installed()
    run(command, way, tmp_path)


def skip_unless_installed() -> None:
    """scripts/demo.sh installs into .venv first; a test changes nobody's installation."""
    made = subprocess.run(
        ["bash", "-c", 'test -e ".venv/.installed-$(cat setup.py scripts/install.sh | cksum | cut -d" " -f1)"'],
        cwd=ROOT,
        check=False,
    )
    if made.returncode:
        pytest.skip("scripts/install.sh has not made .venv here, or made it from another setup.py")
