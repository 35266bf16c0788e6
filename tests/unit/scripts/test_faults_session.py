from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting import deeds, episode, session
from scripts.faulting.compare import Texts, compare
from scripts.faulting.report import failures
from scripts.faulting.session import Run, go_through
from scripts.faulting.settings import Kind, Settings
from scripts.faulting.streams import POOL, Pool, Streams, Told
from scripts.soaking import client, faults, stretch
from scripts.soaking.server import End
from tests.unit.scripts.faulted_server import BACK_OFF_SECONDS, FaultedServer
from tests.unit.scripts.soak_server import SoakServer

QUICK = Settings(placements=("process",), seconds=0.2, concurrency=3, patience=5.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretch, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(episode, "AFTER_SECONDS", 0.2)
    monkeypatch.setattr(episode, "LOOK_SECONDS", 0.03)
    monkeypatch.setattr(deeds, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(faults, "STOP_SECONDS", 3.0)


def went_through(server: FaultedServer, *kinds: Kind, patience: float = 5.0) -> Run:
    settings = Settings(**(QUICK.__dict__ | {"only": kinds, "patience": patience}))
    run = Run("process")

    async def go() -> None:
        async with server.up(), client.open_session() as asking:
            await go_through(settings, run, server, None, asking, Pool(settings), lambda text: None)

    with server.tended():
        asyncio.run(go())
    run.end = End(0, 0.1, [], [], [], 0)
    return run


def compared(run: Run) -> Texts:
    async def go() -> Texts:
        server = SoakServer()
        async with server.up(), client.open_session() as asking:
            return await compare(asking, server.url, Pool(QUICK), run.told, lambda text: None)

    return asyncio.run(go())


def test_each_fault_is_done_and_followed_to_its_end() -> None:
    run = went_through(FaultedServer(), Kind.KILL, Kind.HANG, Kind.SLOW)
    assert [found.kind for found in run.episodes] == [Kind.KILL, Kind.HANG, Kind.SLOW]
    assert [found.restarts for found in run.episodes] == [1, 1, 0]
    for found in run.episodes:
        assert found.recovered
        assert found.hits_back is not None
        assert 0 < found.hits_back < found.window.end - found.window.begin
        assert found.in_flight > 0
        assert found.window.longest > 0
        assert found.quiet.longest > 0
    # A gap that is short has no two samples of who used the cores; that they are all so short is not to be expected.
    spent = [each for found in run.episodes for each in (found.spent, found.spent_quiet)]
    assert any({"reader", "host"} <= each.keys() for each in spent)
    killed, hung, slowed = run.episodes
    assert killed.draft_up is not None
    assert killed.draft_up >= BACK_OFF_SECONDS / 2
    assert slowed.draft_up is None, "it was up all the time"
    assert "ended after" in hung.done
    texts = compared(run)
    assert texts.equal == texts.compared > POOL / 2
    assert failures([run], texts) == []


def test_a_draft_that_dies_at_every_start_is_left_off() -> None:
    server = FaultedServer(restarts=3)
    (found,) = went_through(server, Kind.DYING).episodes
    assert found.recovered
    assert found.hits_back is None
    assert found.left_off is not None
    assert found.restarts == 3
    assert "each of the 3 that were started after it" in found.done


def test_hits_that_do_not_return_are_a_failure() -> None:
    run = went_through(FaultedServer(comes_back=False), Kind.KILL, patience=1.0)
    (line,) = failures([run], compared(run))
    assert line.startswith("process: kill: it did not end as it must")


def test_a_draft_that_is_left_off_where_it_must_not_be_is_a_failure() -> None:
    run = went_through(FaultedServer(restarts=0), Kind.KILL)
    assert run.episodes[0].left_off is not None
    (line,) = failures([run], compared(run))
    assert "kill: it did not end as it must" in line


def test_what_cannot_be_done_is_told_and_a_failure() -> None:
    server = FaultedServer()

    async def go() -> str:
        async with server.up(), client.open_session() as asking:
            scene = deeds.Scene(server, None, asking, None, 1.0)  # type: ignore[arg-type]
            streams = Streams(asking, server, Pool(QUICK), 1)
            found = await episode.undergo("nodes", Kind.NODE, scene, streams, 0.01)
            assert found.impossible
            return found.done

    with server.tended():
        assert asyncio.run(go()) == "not done: the draft is on no node of ours"


def test_a_request_that_is_lost_in_a_window_is_counted_with_it() -> None:
    server = FaultedServer(comes_back=False)

    class OnceItWasKilled(dict[int, str]):
        def get(self, index: int, default: str = "") -> str:  # type: ignore[override]
            return "broken" if server.restarted else default

    server.flaws = OnceItWasKilled()
    run = went_through(server, Kind.KILL, patience=1.0)
    (found,) = run.episodes
    assert found.to_json(run.told)["lost"] == sum(each.lost for each in found.requests(run.told)) > 0
    assert any("requests were lost" in line for line in failures([run], compared(run)))


def test_a_text_that_is_not_plain_vllms_is_a_failure() -> None:
    server = FaultedServer()
    server.flaws = {0: "wrong token", 2: "wrong token"}
    run = went_through(server, Kind.SLOW)
    texts = compared(run)
    assert len(texts.wrong) == 2
    assert texts.equal == texts.compared - 2
    assert failures([run], texts) == [f"2 texts are not plain vLLM's: {'; '.join(texts.wrong)}"]


def test_without_any_hits_no_fault_is_done() -> None:
    server = FaultedServer()
    server.drafts_now = list
    server.drafts = list  # type: ignore[method-assign]
    run = went_through(server, Kind.KILL, patience=0.5)
    assert run.episodes == []
    assert "process: there were no hits before any fault" in failures([run], compared(run))


# ---- the streams ---------------------------------------------------------------------------------------------------


def test_the_pool_has_greedy_seeded_and_sampled_requests_and_comes_round() -> None:
    pool = Pool(QUICK)
    bodies = [pool.request(index).body for index in range(POOL)]
    assert sum(body["temperature"] == 0 for body in bodies) == POOL / 2
    assert sum("seed" in body for body in bodies) == POOL / 4
    assert pool.request(POOL + 5).body == pool.request(5).body
    assert pool.request(POOL + 5).index == POOL + 5
    assert len(pool.comparable()) == 3 * POOL / 4
    assert all(body["stream"] for body in bodies)
    assert Pool(Settings(seed=1)).request(5).body != pool.request(5).body


def test_so_many_streams_are_in_flight_and_all_come_to_their_end() -> None:
    async def go() -> tuple[set[int], list[Told]]:
        server = SoakServer()
        server.piece_seconds = 0.002
        seen = set()
        async with server.up(), client.open_session() as asking:
            streams = Streams(asking, server, Pool(QUICK), 4)
            running = asyncio.create_task(streams.run())
            for _ in range(20):
                await asyncio.sleep(0.02)
                seen.add(len(streams.in_flight))
            streams.stop()
            await running
            assert streams.in_flight == set()
            return seen, streams.told

    seen, told = asyncio.run(go())
    assert max(seen) == 4
    assert sorted(each.answer.index for each in told) == list(range(len(told)))
    assert not any(each.lost for each in told)
