"""The small server of the page, asked as a browser would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from scripts.repository import ROOT
from tests.unit.cli.metrics_server import Server, recorded
from tests.unit.cli.planted_rounds import rounds, write
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.history import History
from vllm_saguaro.cli.metrics_source import NoAnswer, fetch, metrics_url
from vllm_saguaro.cli.trace_tail import TraceFile
from vllm_saguaro.cli.usage import UsageError
from vllm_saguaro.cli.watch_page import FILES, PageServer, address, page_server

PAGE = ROOT / "vllm_saguaro" / "cli" / "page"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "rounds.json"


@pytest.fixture
def page(trace: Path) -> Iterator[PageServer]:
    server = Server(recorded("first"), recorded("second"))
    history = History(metrics_url(server.url), fetch)
    try:
        with page_server("127.0.0.1", 0, history, 0.5, TraceFile(trace)) as page:
            yield page
    finally:
        server.close()


def get(page: PageServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", page.server_port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()


def test_every_file_of_the_page_is_served_and_no_other(page: PageServer) -> None:
    for path, (name, kind) in FILES.items():
        status, headers, body = get(page, path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert body == (PAGE / name).read_bytes()
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert {name for name, _ in FILES.values()} == {file.name for file in PAGE.iterdir()}
    for path in ("/nothing", "/../watch_page.py", "/page/watch.html", "/watch.html"):
        assert get(page, path)[0] == 404


def test_the_page_asks_nobody_else() -> None:
    for file in PAGE.iterdir():
        addresses = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+[^\s\"']*", file.read_text(encoding="utf-8"))
        assert [found for found in addresses if found != "http://www.w3.org/2000/svg"] == [], "a name, never fetched"


def test_the_page_is_in_the_package() -> None:
    found = re.search(r'package_data=\{"vllm_saguaro": \[(.*)\]\}', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    patterns = re.findall(r'"(.*?)"', found[1])
    packed = {file for pattern in patterns for file in (ROOT / "vllm_saguaro").glob(pattern)}
    assert set(PAGE.iterdir()) <= packed


def test_readings_come_as_json(page: PageServer) -> None:
    page.history.ask()
    page.history.ask()
    status, headers, body = get(page, "/readings.json?since=0")
    found = json.loads(body)
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert found["interval"] == 0.5
    assert found["moments"] == page.history.since(0, "")["moments"]
    assert len(found["moments"]) == 1
    assert json.loads(get(page, f"/readings.json?since=1&run={found['run']}")[2])["moments"] == []
    assert json.loads(get(page, "/readings.json?since=x")[2])["moments"] == found["moments"], "nonsense asks for all"


def test_rounds_come_as_json_or_words(page: PageServer, trace: Path) -> None:
    found = json.loads(get(page, "/rounds.json")[2])
    assert "is not there yet" in found["words"]
    write(trace, *rounds(30))
    found = json.loads(get(page, "/rounds.json?last=5")[2])
    assert found["timeline"]["summary"]["passes"] == 5
    assert re.search(r"5 target passes in 48\.0 ms, .* Written \d+ s ago\.", found["words"])
    assert json.loads(get(page, "/rounds.json")[2])["timeline"]["summary"]["passes"] == 24
    for odd, passes in (("0", 1), ("999999", 30), ("-1", 24), ("9" * 40, 24)):
        assert json.loads(get(page, f"/rounds.json?last={odd}")[2])["timeline"]["summary"]["passes"] == passes


def test_without_a_trace_it_says_how_to_get_one() -> None:
    with page_server("127.0.0.1", 0, History("http://h/metrics", fetch), 1.0, None) as page:
        found = json.loads(get(page, "/rounds.json")[2])
    assert found["timeline"] is None
    assert "--trace FILE" in found["words"]
    assert '"trace": "FILE"' in found["words"]


def test_a_name_that_only_leads_here_is_turned_away(page: PageServer) -> None:
    assert get(page, "/readings.json", Host="evil.example")[0] == 403
    for here in (f"localhost:{page.server_port}", "127.0.0.1", "[::1]:5"):
        assert get(page, "/readings.json", Host=here)[0] == 200


def test_an_address_that_is_none_is_answered_all_the_same(page: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert get(page, "/", Host="[")[0] == 400
    assert get(page, "http://[/", Host="localhost")[0] == 400
    assert get(page, "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_slow_server_or_a_browser_that_goes_away_holds_nobody_up(capfd: pytest.CaptureFixture[str]) -> None:
    asked, released = threading.Event(), threading.Event()

    def slow(url: str) -> Snapshot:
        asked.set()
        released.wait(60)
        raise NoAnswer(f"{url} took too long")

    history = History("http://h/metrics", slow)
    asking = threading.Thread(target=history.ask)
    asking.start()
    assert asked.wait(20)
    with page_server("127.0.0.1", 0, history, 1.0, None) as page:
        idle = socket.create_connection(("127.0.0.1", page.server_port))
        gone = socket.create_connection(("127.0.0.1", page.server_port))
        gone.sendall(b"GET /readings.json HTTP/1.0\r\n\r\n")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        gone.close()
        assert get(page, "/")[0] == 200
        assert json.loads(get(page, "/readings.json")[2])["problem"] is None
        released.set()
        asking.join()
        assert json.loads(get(page, "/readings.json")[2])["problem"]["words"] == "http://h/metrics took too long"
        idle.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("127.0.0.1", 0)),
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:8080", ("::1", 8080)),
        ("box:65535", ("box", 65535)),
    ],
)
def test_addresses_are_taken_as_people_write_them(text: str, expected: tuple[str, int]) -> None:
    assert address(text) == expected


@pytest.mark.parametrize("text", ["", "x", "localhost", "65536", "-1", "h:", "http://h:1", "1" * 5000])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        address(text)


def test_a_port_in_use_is_one_line(page: PageServer) -> None:
    with (
        pytest.raises(UsageError, match=rf"no page at 127\.0\.0\.1:{page.server_port} \(.*in use\)"),
        page_server("127.0.0.1", page.server_port, page.history, 1.0, None),
    ):
        pass


def test_the_command_prints_where_the_page_is_outlives_the_server_and_ends_with_130() -> None:
    server = Server(recorded("first"), None, recorded("second"))
    command = [sys.executable, "-m", "vllm_saguaro.cli", "watch", server.url, "--web", "--interval", "0.1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"a page about (\S+): http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found is not None, line
        connection = HTTPConnection("127.0.0.1", int(found[2]), timeout=120)
        connection.request("GET", "/")
        assert b"<title>vllm-saguaro watch</title>" in connection.getresponse().read()
        said = [process.stderr.readline() for _ in range(3)]
        assert ["answers 503" in each for each in said] == [False, True, False]
        server.close()
        assert "does not answer" in process.stderr.readline()
        connection.request("GET", "/readings.json")
        assert json.loads(connection.getresponse().read())["problem"]["kind"] == "no answer"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
