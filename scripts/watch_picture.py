"""The picture of the page of `vllm-saguaro watch --web`: a real server, real requests, a real browser.

    python scripts/watch_picture.py                       into docs/pictures/watch_web.png: a minute or two
    python scripts/watch_picture.py --dark --width 390    as a phone shows it at night

Needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.illustrations.browser import BrowserError, browser
from scripts.repository import ROOT
from scripts.soaking.server import free_port
from vllm_saguaro.benchmark.deepened import deepened

PAIR = ROOT / "assets" / "pair"
OUTPUT = ROOT / "docs" / "pictures" / "watch_web.png"
NAME = "pair"
_START = 900.0
_END = 60.0


class NoServer(RuntimeError):
    """The server did not come up; the end of its log."""


def server_command(target: Path, draft: Path, trace: Path, port: int) -> list[str]:
    """`vllm serve` as a user would write it."""
    speculation = {"method": "saguaro", "model": str(draft), "trace": str(trace)}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target), "--served-model-name", NAME),
        *("--speculative-config", json.dumps(speculation), "--dtype", "float32", "--enforce-eager"),
        *("--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 30), "--host", "127.0.0.1", "--port", str(port)),
    ]


@contextlib.contextmanager
def served(command: list[str], url: str, log: Path) -> Iterator[None]:
    """A server that answers. Raises NoServer."""
    with log.open("wb") as file:
        environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + _START
        while not _answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise NoServer(log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_END)
        except subprocess.TimeoutExpired:  # on a busy machine, or while it was starting
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(url: str, prompts: list[str], tokens: int, temperature: float, ended: threading.Event) -> None:
    """One client: one request after the other until it is told to end."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for turn in range(1 << 30):
            if ended.is_set():
                return
            words = {"model": NAME, "prompt": prompts[turn % len(prompts)], "max_tokens": tokens, "ignore_eos": True}
            client.post("/v1/completions", json={**words, "temperature": temperature}).raise_for_status()


def draw(arguments: argparse.Namespace) -> Path:
    """Serve, ask, look, and write the picture."""
    target = deepened(PAIR / "target", arguments.target_layers)
    draft = deepened(PAIR / "target" / "draft", arguments.draft_layers)
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    port, ended = free_port(), threading.Event()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "rounds.json"
        with served(server_command(target, draft, trace, port), url, Path(folder) / "log.txt"):
            clients = [
                threading.Thread(
                    target=ask, args=(url, prompts[number::8], arguments.tokens, arguments.temperature, ended)
                )
                for number in range(arguments.clients)
            ]
            for client in clients:
                client.start()
            try:
                look(url, trace, arguments)
            finally:
                ended.set()
                for client in clients:
                    client.join()
    return Path(arguments.output)


def look(url: str, trace: Path, arguments: argparse.Namespace) -> None:
    """Start the command, open its page, wait, and take the picture."""
    command = [
        sys.executable,
        "-m",
        "vllm_saguaro.cli",
        "watch",
        url,
        "--interval",
        "1",
        "--web",
        "--trace",
        str(trace),
    ]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None
        address = page.stdout.readline().partition(": ")[2].split()[0]
        with browser() as window:
            window.show_as(arguments.width, arguments.height, arguments.dark)
            window.open(address)
            time.sleep(arguments.seconds)
            print(window.texts("#rounds-words")[0])
            window.picture(arguments.output)
            complaints = window.complaints()
        if complaints:
            raise BrowserError("; ".join(complaints))
    finally:
        page.send_signal(signal.SIGINT)
        page.wait(_END)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--target-layers", type=int, default=12, help="the pair deepened (default: 12 and 6)")
    found.add_argument("--draft-layers", type=int, default=6)
    found.add_argument("--clients", type=int, default=1, help="requests at once (default: 1)")
    found.add_argument("--tokens", type=int, default=128, help="a request (default: 128)")
    found.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    found.add_argument("--seconds", type=float, default=62.0, help="of watching before the picture (default: 62)")
    found.add_argument("--width", type=int, default=1280)
    found.add_argument("--height", type=int, default=1240)
    found.add_argument("--dark", action="store_true")
    found.add_argument("--output", type=Path, default=OUTPUT, help=f"(default: {OUTPUT.relative_to(ROOT)})")
    return found


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(words)
    try:
        print(f"written to {draw(arguments)}")
    except (OSError, NoServer, BrowserError, httpx.HTTPError) as error:
        raise SystemExit(f"watch_picture.py: {error}") from error


if __name__ == "__main__":
    main()
