from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import soak
from scripts.soaking import client, episode, stretch, traffic
from scripts.soaking.accounts import Accounts
from scripts.soaking.answers import Answer, Fate
from scripts.soaking.journal import Journal
from scripts.soaking.report import report_json, report_text
from scripts.soaking.server import End
from scripts.soaking.session import sit
from scripts.soaking.settings import Settings
from scripts.soaking.traffic import Traffic
from tests.unit.scripts.soak_server import SoakServer
from vllm_saguaro.benchmark import provenance

SMALL = Settings(requests=80, faults={}, warm_up=10, seed=1, hits_patience=5.0)


class Served(SoakServer):
    """Stands in for `VllmServer`: the soak starts it and ends it. `made` has all of them."""

    made: list[Served]
    plan: Callable[[Served, bool], None]

    def __init__(self, settings: Settings, plain: bool, log: Path) -> None:
        super().__init__()
        self.plain = plain
        self._up = contextlib.AsyncExitStack()
        Served.made.append(self)
        Served.plan(self, plain)

    async def wait_until_up(self) -> float:
        await self._up.enter_async_context(self.up())
        return 0.0

    def log_text(self) -> str:
        return "INFO all is well\nERROR no\n(Worker) ERROR 11-25 something\n(APIServer) ERROR no\n"

    def end(self) -> End:
        self.alive = False
        return End(0, 0.1, [], [], [], 0)

    def kill(self) -> None:
        self.alive = False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the waiting for vLLM's sake."""
    monkeypatch.setattr(stretch, "VllmServer", Served)
    monkeypatch.setattr(stretch, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(traffic, "LULL_SECONDS", 0.01)
    monkeypatch.setattr(traffic, "STEADY_SECONDS", 0.001)
    monkeypatch.setattr(episode, "LOOK_SECONDS", 0.05)
    about = {"processor": {"model": "none"}, "git": {"revision": "0123456789ab", "dirty": False}}
    monkeypatch.setattr(provenance, "collect", lambda cores: about | {"versions": {"vllm": "0.32"}})
    Served.made = []
    Served.plan = lambda server, plain: None


@pytest.fixture
def draft() -> Iterator[Callable[[], list[int]]]:
    """A draft process that is started again when it is gone: which one there is now."""
    started: list[subprocess.Popen[bytes]] = []

    def now() -> list[int]:
        if not started or started[-1].poll() is not None:
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return [started[-1].pid]

    yield now
    for process in started:
        process.kill()
        process.wait()


def sat(settings: Settings, state: Path, minutes: float | None = None) -> tuple[Accounts, Journal]:
    journal = Journal(state, settings.to_json())
    accounts = asyncio.run(sit(settings, journal, minutes, lambda text: None))
    journal.close()
    return accounts, journal


def asked_of(plain: bool) -> dict[int, int]:
    total: dict[int, int] = {}
    for server in Served.made:
        if server.plain == plain:
            for index, count in server.asked.items():
                total[index] = total.get(index, 0) + count
    return total


def with_flaw(index: int, flaw: str) -> Callable[[Served, bool], None]:
    def change(server: Served, plain: bool) -> None:
        server.flaws = {} if plain else {index: flaw}

    return change


def comparable(settings: Settings = SMALL, **wanted: Any) -> int:
    """A request in the middle, greedy, one text, not closed, with these keys in its body."""
    requests = map(Traffic(settings).request, range(20, settings.requests))
    return next(
        one.index
        for one in requests
        if one.body["temperature"] == 0
        and not one.refused
        and one.close_after is None
        and one.hold is None
        and one.structure is None
        and wanted.items() <= one.body.items()
    )


def test_a_good_server_passes(tmp_path: Path) -> None:
    accounts, journal = sat(SMALL, tmp_path / "state")
    assert accounts.failures == []
    assert accounts.finished
    assert accounts.equal == accounts.compared == accounts.comparable > 30
    assert asked_of(plain=False) == dict.fromkeys(range(80), 1)
    assert set(asked_of(plain=True).values()) == {1}
    assert "all is accounted for" in report_text(SMALL, accounts, journal)


@pytest.mark.parametrize("flaw", ["error", "broken", "no end", "error event", "another's", "no reason"])
def test_a_lost_answer_is_found(tmp_path: Path, flaw: str) -> None:
    index = comparable(stream=True)
    Served.plan = with_flaw(index, flaw)
    accounts, _ = sat(SMALL, tmp_path / "state")
    (failure,) = accounts.failures
    assert failure.startswith(f"1 requests lost: {index} (")
    assert accounts.finished


def test_a_wrong_text_is_found_and_asked_for_again(tmp_path: Path) -> None:
    index = comparable()
    Served.plan = with_flaw(index, "wrong token")
    accounts, journal = sat(SMALL, tmp_path / "state")
    (failure,) = accounts.failures
    assert failure.startswith(f"1 texts are not plain vLLM's: {index} (")
    assert [record["index"] for record in journal.of("again")] == [index]
    assert asked_of(plain=True)[index] > 5
    assert f"FAILED: {failure}" in report_text(SMALL, accounts, journal)


def test_a_text_that_plain_vllm_says_in_company_is_a_tie(tmp_path: Path) -> None:
    index = comparable()

    def change(server: Served, plain: bool) -> None:
        server.flaws = {} if plain else {index: "wrong token"}
        server.of_two_minds = {index} if plain else set()
        server.piece_seconds = 0.002

    Served.plan = change
    settings = Settings(**(SMALL.__dict__ | {"concurrency": 1}))
    accounts, journal = sat(settings, tmp_path / "state")
    assert accounts.failures == []
    assert [tie["index"] for tie in accounts.ties] == [index]
    assert "other batches" in accounts.ties[0]["why"]
    assert f"tie: request {index}" in report_text(settings, accounts, journal)


@pytest.mark.parametrize(
    ("flaw", "words"),
    [("short", "requests with a wrong form"), ("refused", "requests refused that should have been served")],
)
def test_other_flaws_are_found(tmp_path: Path, flaw: str, words: str) -> None:
    Served.plan = with_flaw(comparable(), flaw)
    accounts, _ = sat(SMALL, tmp_path / "state")
    assert any(words in failure for failure in accounts.failures)


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    def stops(server: Served, plain: bool) -> None:
        server.piece_seconds = 0.005
        count = len(Served.made)

        class Counting(type(server.asked)):  # type: ignore[misc]
            def __setitem__(self, index: int, value: int) -> None:
                super().__setitem__(index, value)
                if len(self) == 25 and count in (1, 2):
                    os.kill(os.getpid(), signal.SIGINT)

        server.asked = Counting()

    Served.plan = stops
    first, _ = sat(SMALL, tmp_path / "state")
    assert not first.finished
    assert first.failures == []
    assert 25 <= sum(first.fates.values()) < 80
    second, _ = sat(SMALL, tmp_path / "state")
    assert sum(first.fates.values()) < sum(second.fates.values()) < 80
    third, journal = sat(SMALL, tmp_path / "state")
    assert third.finished
    assert third.failures == []
    assert asked_of(plain=False) == dict.fromkeys(range(80), 1)
    assert len(journal.of("stretch")) == 3
    assert [server.plain for server in Served.made] == [False, False, False, True]


def test_a_time_limit_stops_a_run(tmp_path: Path) -> None:
    accounts, journal = sat(SMALL, tmp_path / "state", minutes=0.0)
    assert not accounts.finished
    assert "goes on" in report_text(SMALL, accounts, journal)


def test_what_has_been_answered_can_be_compared_before_all_is(tmp_path: Path) -> None:
    def stops(server: Served, plain: bool) -> None:
        class Counting(type(server.asked)):  # type: ignore[misc]
            def __setitem__(self, index: int, value: int) -> None:
                super().__setitem__(index, value)
                if len(self) == 40 and not plain:
                    os.kill(os.getpid(), signal.SIGINT)

        server.asked = Counting()

    Served.plan = stops
    before, _ = sat(SMALL, tmp_path / "state")
    assert before.compared == 0
    journal = Journal(tmp_path / "state", SMALL.to_json())
    accounts = asyncio.run(sit(SMALL, journal, None, lambda text: None, compare_now=True))
    journal.close()
    assert [server.plain for server in Served.made] == [False, True]
    assert accounts.fates == before.fates
    assert accounts.equal == accounts.compared == accounts.comparable > 10
    assert not accounts.finished


def test_a_run_that_is_done_asks_nothing_more(tmp_path: Path) -> None:
    sat(SMALL, tmp_path / "state")
    before = len(Served.made)
    accounts, _ = sat(SMALL, tmp_path / "state")
    assert accounts.finished
    assert len(Served.made) == before


def test_faults_are_done_and_measured(tmp_path: Path, draft: Callable[[], list[int]]) -> None:
    def change(server: Served, plain: bool) -> None:
        server.drafts_now = draft
        server.piece_seconds = 0.005

    Served.plan = change
    settings = Settings(**(SMALL.__dict__ | {"faults": {"kill": 3}}))
    accounts, journal = sat(settings, tmp_path / "state")
    assert accounts.failures == []
    faults = journal.of("fault")
    assert [fault["number"] for fault in faults] == [0, 1, 2]
    for fault in faults:
        assert fault["done"] == "SIGKILL"
        assert fault["new_process"]
        assert fault["lost"] == 0
        assert 0 < fault["hits_back"] < 5
        assert fault["draft_up"] is not None
    assert any(fault["in_flight"] and fault["longest_stall"] > 0 for fault in faults)
    table = report_text(settings, accounts, journal)
    assert "SIGKILL" in table
    assert report_json(settings, accounts, journal)["faults_done"] == {"kill": 3}


def test_a_fault_that_a_stop_comes_into_is_done_again(tmp_path: Path, draft: Callable[[], list[int]]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stopped: list[int] = []

    def gone() -> list[int]:
        if process.poll() is None:
            return [process.pid]
        if not stopped:  # before another one is started
            stopped.append(os.getpid())
            os.kill(os.getpid(), signal.SIGINT)
        return []

    def change(server: Served, plain: bool) -> None:
        server.piece_seconds = 0.005
        server.drafts_now = draft if stopped else gone

    Served.plan = change
    settings = Settings(**(SMALL.__dict__ | {"faults": {"kill": 1}, "hits_patience": 60.0}))
    first, journal = sat(settings, tmp_path / "state")
    assert journal.of("fault") == []
    assert journal.of("stretch")[0]["cut_short"] == [0]
    assert not first.finished
    second, journal = sat(settings, tmp_path / "state")
    assert [fault["number"] for fault in journal.of("fault")] == [0]
    assert journal.of("stretch")[1]["cut_short"] == []
    assert second.failures == []


def test_faults_that_are_all_due_when_a_run_is_gone_on_with_have_traffic_each(
    tmp_path: Path, draft: Callable[[], list[int]]
) -> None:
    def change(server: Served, plain: bool) -> None:
        server.drafts_now = draft
        server.hits_need_traffic = True
        server.piece_seconds = 0.0 if plain else 0.02

    Served.plan = change
    settings = Settings(**(SMALL.__dict__ | {"faults": {"kill": 3}, "warm_up": 0}))
    state = tmp_path / "state"
    journal = Journal(state, settings.to_json())
    for index in range(50):
        journal.add("answer", **Answer(index, Fate.FINISHED).to_json())
    journal.close()
    _, journal = sat(settings, state)
    faults = journal.of("fault")
    assert all(fault["position"] < 80 for fault in faults)
    assert [fault["number"] for fault in sorted(faults, key=lambda fault: fault["number"])] == [0, 1, 2]
    assert all(fault["hits_back"] is not None for fault in faults)


def test_a_request_that_a_fault_loses_is_counted_with_it(tmp_path: Path, draft: Callable[[], list[int]]) -> None:
    settings = Settings(**(SMALL.__dict__ | {"faults": {"kill": 1}, "warm_up": 0}))

    def change(server: Served, plain: bool) -> None:
        server.drafts_now = draft
        server.piece_seconds = 0.0 if plain else 0.03  # all are still in flight when the fault comes
        server.flaws = {} if plain else dict.fromkeys(range(80), "broken")

    Served.plan = change
    accounts, journal = sat(settings, tmp_path / "state")
    (fault,) = journal.of("fault")
    assert fault["lost"] > 0
    assert any(failure.startswith(f"{accounts.fates['lost']} requests lost") for failure in accounts.failures)


def test_a_draft_that_does_not_come_back_is_found(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def change(server: Served, plain: bool) -> None:
        server.drafts_now = lambda: [process.pid] if process.poll() is None else []

    Served.plan = change
    settings = Settings(**(SMALL.__dict__ | {"faults": {"kill": 1}, "hits_patience": 0.5}))
    accounts, _ = sat(settings, tmp_path / "state")
    assert accounts.failures == ["after 1 faults hits did not return: 1 (SIGKILL)"]


def test_a_server_that_ends_by_itself_is_found(tmp_path: Path) -> None:
    def change(server: Served, plain: bool) -> None:
        class Dying(type(server.asked)):  # type: ignore[misc]
            def __setitem__(self, index: int, value: int) -> None:
                super().__setitem__(index, value)
                if index == 30:
                    server.alive = False

        server.asked = Dying()

    Served.plan = change
    accounts, _ = sat(SMALL, tmp_path / "state")
    assert "stretch 1: the server ended by itself" in accounts.failures
    assert not accounts.finished


def test_no_more_than_so_many_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most, original = 0, 0, client.ask

    async def counted(*words: Any) -> Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await original(*words)
        finally:
            now -= 1

    monkeypatch.setattr(client, "ask", counted)
    sat(Settings(**(SMALL.__dict__ | {"concurrency": 3, "requests": 60})), tmp_path / "state")
    assert most == 3


def test_lines_of_the_log_that_tell_of_errors_are_counted(tmp_path: Path) -> None:
    _, journal = sat(SMALL, tmp_path / "state")
    assert journal.of("stretch")[0]["log"] == {"errors": 1, "tracebacks": 0}


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [([], 0), (["--minutes", "0"], soak.UNFINISHED), (["--requests", "0"], soak.WRONG_OPTION),
     (["--kills", "90"], soak.WRONG_OPTION), (["--option", "brunches=3"], soak.WRONG_OPTION),
     (["--placement", "inline", "--kills", "1"], soak.WRONG_OPTION)],
)  # fmt: skip
def test_the_exit_status_says_how_it_went(tmp_path: Path, words: list[str], status: int) -> None:
    usual = ["--requests", "40", "--kills", "0", "--state", str(tmp_path / "state.jsonl")]
    try:
        soak.main([*usual, *words])
        found: int | str | None = 0
    except SystemExit as end:
        found = end.code
    assert found == status
    assert (tmp_path / "state.report.json").exists() == (status in (0, soak.UNFINISHED))


def test_a_failed_soak_has_status_one(tmp_path: Path) -> None:
    Served.plan = with_flaw(comparable(Settings(requests=40)), "error")
    with pytest.raises(SystemExit) as end:
        soak.main(["--requests", "40", "--kills", "0", "--state", str(tmp_path / "state.jsonl")])
    assert end.value.code == soak.FAILED


def test_the_server_gets_the_options_and_restarts_enough() -> None:
    arguments = soak.parser().parse_args(["--kills", "7", "--option", "branches=6", "--placement", "process"])
    command = soak.settings_from(arguments).command(1234, plain=False)
    assert '{"method": "saguaro", "draft_restarts": 12, "branches": 6, "placement": "process"}' in command
    assert "--speculative-config" not in soak.settings_from(arguments).command(1234, plain=True)
