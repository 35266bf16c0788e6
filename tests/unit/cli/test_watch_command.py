"""The terminal's view of what a real server answered (vLLM 0.32, the committed pair), recorded twice."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.unit.cli.metrics_server import Server, recorded
from vllm_saguaro.cli import watch_command
from vllm_saguaro.cli.main import main
from vllm_saguaro.cli.metrics_source import NoAnswer, fetch, metrics_url
from vllm_saguaro.cli.usage import UsageError


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(recorded("first"), recorded("second"))
    yield server
    server.close()


def number(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def stop_after(monkeypatch: pytest.MonkeyPatch, sleeps: int) -> list[float]:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if len(slept) == sleeps:
            raise KeyboardInterrupt
        slept.append(seconds)

    monkeypatch.setattr(watch_command.time, "sleep", sleep)
    return slept


def test_once_shows_all_since_the_start(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", server.url, "--once"]) == 0
    said = capsys.readouterr().out
    text = recorded("first")
    hits, misses = number(text, "vllm:saguaro_hits_total"), number(text, "vllm:saguaro_misses_total")
    assert hits > 10, "the recording has something in it"
    assert f"{hits / (hits + misses):.1%}  of {hits + misses:.0f} outcomes" in said
    for subject in ("acceptance", "by position", "misses", "backups", "late tables", "chosen now", "target waits"):
        assert subject in said
    assert "\x1b" not in said
    assert all(len(line) <= 100 for line in said.splitlines())
    assert server.asked == ["/metrics"]


def test_json_is_one_object_a_line_and_the_second_is_what_is_new(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = stop_after(monkeypatch, 1)
    assert main(["watch", server.url, "--json", "--interval", "0.5"]) == 130
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert slept == [0.5]
    old, new = (number(recorded(name), "vllm:saguaro_hits_total") for name in ("first", "second"))
    assert first["outcomes"] * first["hit_rate"] == pytest.approx(old)
    assert second["outcomes"] * second["hit_rate"] == pytest.approx(new - old)
    assert first["seconds"] is None
    assert second["tokens_per_second"] > 0


def test_what_was_chosen_has_a_c_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = recorded("first")
    server = Server(text, text + 'vllm:saguaro_sampling_c{engine="0",model_name="pair"} 0.5\n')
    try:
        for words, c in (("K = 3, N = 32", None), ("K = 3, N = 32, C = 0.5", 0.5)):
            assert main(["watch", server.url, "--once"]) == 0
            assert f"chosen now      {words}" in capsys.readouterr().out.splitlines()
            # The server answers with its last text for ever.
            if c is not None:
                assert main(["watch", server.url, "--once", "--json"]) == 0
                assert json.loads(capsys.readouterr().out)["chosen_c"] == c
    finally:
        server.close()


def test_an_answer_that_fails_once_is_waited_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(recorded("first"), None, recorded("second"))
    stop_after(monkeypatch, 2)
    try:
        assert main(["watch", server.url, "--json"]) == 130
    finally:
        server.close()
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "answers 503" in said.err


def test_a_server_without_our_metrics_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server("vllm:generation_tokens_total 3\n")
    try:
        assert main(["watch", server.url, "--once"]) == 1
    finally:
        server.close()
    assert "--speculative-config saguaro" in capsys.readouterr().err


def test_no_server_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server("")
    server.close()
    assert main(["watch", server.url]) == 1
    said = capsys.readouterr().err
    assert "does not answer" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"what?\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nvllm:",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nvl",
    ],
)
def test_a_server_that_breaks_off_is_one_line(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"
        with pytest.raises(NoAnswer, match=r"/metrics does not answer \(.+\): does the server run\?$") as found:
            fetch(url)
        thread.join()
    assert "\n" not in str(found.value)


def test_addresses_are_taken_as_people_write_them() -> None:
    url = metrics_url
    assert url("localhost:8000") == "http://localhost:8000/metrics"
    assert url("http://h:1/") == url("http://h:1/metrics") == "http://h:1/metrics"
    assert url("https://h/prefix/") == "https://h/prefix/metrics"
    for wrong in ("ftp://h", "http://", "file:///etc", "http://[::1", "http://h:port", "http://h:99999", "[", "h:0"):
        with pytest.raises(UsageError, match="no address"):
            url(wrong)


def test_an_interval_of_nothing_is_refused() -> None:
    assert main(["watch", "localhost", "--interval", "0"]) == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--web", "--once"], "leave out --once and --json"),
        (["--web", "--json"], "leave out --once and --json"),
        (["--trace", "rounds.json"], "write --web too"),
        (["--web", "--trace", "."], "is a folder"),
        (["--web", "http://localhost:8000"], "is no address"),
        (["--web", "70000"], "is no address"),
    ],
)
def test_a_page_is_asked_for_rightly(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "localhost:8000", *words]) == 2
    assert complaint in capsys.readouterr().err
