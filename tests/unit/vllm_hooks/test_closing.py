"""What is given up is closed aside, and whoever has to wait for it can."""

from __future__ import annotations

import threading

import pytest

from vllm_saguaro.vllm_hooks import closing
from vllm_saguaro.vllm_hooks.closing import Closing


def test_it_is_closed_aside_and_can_be_waited_for() -> None:
    may_end, ended = threading.Event(), list[threading.Thread]()

    def close() -> None:
        if threading.current_thread() is not threading.main_thread():
            may_end.wait(600)
        ended.append(threading.current_thread())

    one = Closing()
    one.wait()  # nothing was given up
    one.begin(close)
    assert not ended
    may_end.set()
    one.wait()
    assert len(ended) == 1
    assert ended != [threading.current_thread()]
    assert ended[0].daemon, "it must not keep the process"
    one.wait()


def test_what_it_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    one = Closing()
    one.begin(lambda: print(1 / 0))
    one.wait()
    assert caplog.messages == ["Saguaro: closing the draft failed, too."]


def test_it_is_closed_where_no_thread_starts_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    one, ended = Closing(), list[int]()
    one.begin(lambda: ended.append(1))
    one.wait()
    assert ended == [1]


def test_one_that_does_not_end_holds_nobody_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(closing, "_PATIENCE", 0.01)
    one, may_end = Closing(), threading.Event()

    def close() -> None:
        may_end.wait(600)

    one.begin(close)
    one.wait()
    may_end.set()
    assert caplog.messages == ["Saguaro: the draft that was given up does not end; it goes with the process."]
