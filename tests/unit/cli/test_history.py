"""Readings one after the other, of a server that answers, is gone, begins anew, has several engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.cli.metrics_server import recorded
from vllm_saguaro.cli import history as module
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.history import History
from vllm_saguaro.cli.metrics_source import NoAnswer
from vllm_saguaro.cli.reading import read
from vllm_saguaro.cli.wording import rows


class Clock:
    """Each question comes two seconds after the one before."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 2.0
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def time_ns(self) -> int:
        return int(1e9 * self.now)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def asked(*texts: str | None, moments: int = 1800) -> History:
    """A history after one question for each text; None: no answer."""
    answers: Iterator[str | None] = iter(texts)

    def fetch(url: str) -> Snapshot:
        text = next(answers)
        if text is None:
            raise NoAnswer(f"{url} does not answer")
        return Snapshot(text)

    found = History("http://h/metrics", fetch, moments)
    for _ in texts:
        found.ask()
    return found


def changed(text: str, change: Callable[[str], str]) -> str:
    return "\n".join(change(line) for line in text.splitlines())


def counting(hits: int, engine: str = "0") -> str:
    return f'vllm:saguaro_hits_total{{engine="{engine}"}} {hits}\n'


def test_the_first_answer_is_all_since_the_start_and_the_second_a_moment() -> None:
    assert asked(recorded("first")).since(0, "")["moments"] == []
    found = asked(recorded("first"), recorded("second")).since(0, "")
    first, second = Snapshot(recorded("first")), Snapshot(recorded("second"))
    (moment,) = found["moments"]
    reading = read(second, first, 2.0)
    assert reading.outcomes > 0
    assert moment["readings"] == {"all": reading.to_json()}
    assert not moment["anew"]
    assert found["from_start"] == {"all": read(second).to_json()}
    assert found["table"]["all"]["now"] == [row.to_json() for row in rows(reading)], "the words of the terminal's view"
    assert found["table"]["all"]["from_start"] == [row.to_json() for row in rows(read(second))]
    assert found["table"]["all"]["span"] == "the last 2.0 s"
    assert (found["engines"], found["problem"]) == (["all"], None)


def test_only_what_is_asked_for_is_told_again() -> None:
    history = asked(*(counting(hits) for hits in (10, 11, 13, 17)))
    run = history.since(0, "")["run"]
    assert [moment["number"] for moment in history.since(0, run)["moments"]] == [1, 2, 3]
    assert [moment["number"] for moment in history.since(2, run)["moments"]] == [3]
    assert history.since(3, run)["moments"] == []
    other = history.since(99, "of another command")["moments"]
    assert [moment["readings"]["all"]["outcomes"] for moment in other] == [1, 2, 4]


def test_it_does_not_grow_for_ever() -> None:
    history = asked(*(counting(hits) for hits in range(10)), moments=3)
    assert [moment["number"] for moment in history.since(0, "")["moments"]] == [7, 8, 9]


def test_no_answer_is_said_since_when_and_the_next_one_goes_on_from_before() -> None:
    history = asked(counting(10), None, None)
    found = history.since(0, "")
    assert found["problem"] == {
        "kind": "no answer",
        "words": "http://h/metrics does not answer",
        "since": pytest.approx(1e9 + 102.0),
    }
    assert found["table"]["all"]["from_start"], "what was read is still there"
    history = asked(counting(10), None, counting(14))
    found = history.since(0, "")
    assert found["problem"] is None
    (moment,) = found["moments"]
    assert moment["readings"]["all"]["outcomes"] == 4


def test_a_server_that_was_never_there_is_a_problem_and_nothing_else() -> None:
    found = asked(None).since(0, "")
    assert (found["moments"], found["engines"], found["table"]) == ([], [], {})
    assert found["problem"]["kind"] == "no answer"


def test_a_server_without_our_metrics_is_told_what_is_missing() -> None:
    found = asked("vllm:generation_tokens_total 3\n").since(0, "")
    assert found["problem"]["kind"] == "no metrics of ours"
    assert "--speculative-config saguaro" in found["problem"]["words"]


def test_a_server_that_began_anew_counts_from_its_start() -> None:
    found = asked(counting(100), None, counting(7), counting(9)).since(0, "")
    assert [moment["anew"] for moment in found["moments"]] == [True, False]
    assert [moment["readings"]["all"]["outcomes"] for moment in found["moments"]] == [7, 2]


def test_any_counter_tells_that_the_server_began_anew() -> None:
    late = 'vllm:saguaro_late_tables_total{engine="0"} %d\n'
    found = asked(counting(100) + late % 30, counting(120) + late % 2).since(0, "")
    assert found["moments"][0]["anew"], "more hits than before, but fewer late tables"


def test_several_engines_have_a_reading_each_and_one_together() -> None:
    second = changed(recorded("second"), lambda line: line.replace('engine="0"', 'engine="1"'))
    drafts = 'vllm:saguaro_drafts{engine="1",model_name="pair"} '
    second = changed(second, lambda line: drafts + "1" if line.startswith(drafts) else line)
    both = recorded("first") + second
    found = asked(both, both).since(0, "")
    assert found["engines"] == ["all", "engine 0", "engine 1"]
    whole, one, other = (found["from_start"][engine] for engine in found["engines"])
    assert whole["outcomes"] == one["outcomes"] + other["outcomes"]
    assert one == read(Snapshot(recorded("first"))).to_json()
    assert (one["chosen_k"], other["chosen_k"], whole["chosen_k"]) == (3, 1, 2), "the mean, not the sum"
    assert set(found["moments"][0]["readings"]) == set(found["engines"])


def test_c_of_several_engines_is_the_mean_of_those_that_have_one() -> None:
    c = 'vllm:saguaro_sampling_c{engine="%s",model_name="pair"} %g\n'
    other = changed(recorded("first"), lambda line: line.replace('engine="0"', 'engine="1"'))
    third = changed(recorded("first"), lambda line: line.replace('engine="0"', 'engine="2"'))
    text = f"{recorded('first')}\n{other}\n{third}\n" + c % ("0", 0.5) + c % ("1", 0.1)
    found = asked(text, text).since(0, "")["from_start"]
    assert [found[engine]["chosen_c"] for engine in ("engine 0", "engine 1", "engine 2")] == [0.5, 0.1, None]
    assert found["all"]["chosen_c"] == pytest.approx(0.3)


def test_an_engine_that_comes_later_is_read_from_its_start() -> None:
    found = asked(counting(5), counting(6) + counting(40, "1") + counting(1, "10")).since(0, "")
    assert found["engines"] == ["all", "engine 0", "engine 1", "engine 10"]
    readings = found["moments"][0]["readings"]
    assert (readings["engine 0"]["outcomes"], readings["engine 1"]["outcomes"]) == (1, 40)
