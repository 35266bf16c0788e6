"""The picture of the page, taken of a planted server; and what is said when there is no server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import watch_picture
from scripts.illustrations.browser import PACKAGES, is_installed
from tests.unit.cli.metrics_server import Server, recorded
from tests.unit.cli.planted_rounds import rounds, write
from vllm_saguaro.config import split_options


def test_a_server_that_does_not_come_up_is_said_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no room for the weights'); raise SystemExit(1)"]
    with (
        pytest.raises(watch_picture.NoServer, match="no room for the weights"),
        watch_picture.served(command, "http://127.0.0.1:9", tmp_path / "log.txt"),
    ):
        pass


DEAF = """
import http.server, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_picture, "_END", 0.5)
    port = watch_picture.free_port()
    url = f"http://127.0.0.1:{port}"
    with watch_picture.served([sys.executable, "-c", DEAF, str(port)], url, tmp_path / "log.txt"):
        assert watch_picture._answers(f"{url}/health")
    assert not watch_picture._answers(f"{url}/health")


def test_the_server_is_asked_for_a_trace() -> None:
    command = watch_picture.server_command(Path("target"), Path("draft"), Path("rounds.json"), 8000)
    words = json.loads(command[command.index("--speculative-config") + 1])
    assert words.pop("trace") == "rounds.json"
    split_options(words)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason=f"no Chromium and driver here: apt-get install {PACKAGES}")
def test_the_picture_is_as_large_as_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "rounds.json", tmp_path / "page.png"
    write(trace, *rounds(6))
    server = Server(recorded("first"), recorded("second"))
    words = ["--seconds", "3", "--width", "640", "--height", "480", "--output", str(picture)]
    try:
        watch_picture.look(server.url, trace, watch_picture.parser().parse_args(words))
    finally:
        server.close()
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (640, 480)
    assert "6 target passes in 58.0 ms" in capsys.readouterr().out
