"""Servers of this process are measured; what they count and say is known."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from tests.unit.benchmark.served.fake_server import FakeServer
from vllm_saguaro.benchmark import records
from vllm_saguaro.benchmark.served.client import ServerError
from vllm_saguaro.benchmark.served.records import Load, Report
from vllm_saguaro.benchmark.served.session import measure
from vllm_saguaro.benchmark.served.settings import Settings
from vllm_saguaro.benchmark.served.summary import summarise
from vllm_saguaro.benchmark.served.tables import report_text
from vllm_saguaro.benchmark.settings import SettingsError

Make = Callable[..., FakeServer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[FakeServer] = []

    def one(**how: Any) -> FakeServer:
        made.append(FakeServer(**how))
        return made[-1]

    yield one
    for server in made:
        server.close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{number}"}) + "\n" for number in range(6)))
    return path


def settings_of(prompts: Path, *servers: FakeServer, **changes: Any) -> Settings:
    names = ("plain", "saguaro", "third")
    chosen = Settings(
        servers=tuple(zip(names, (server.url for server in servers), strict=False)),
        dataset_path=prompts,
        prompts=6,
        tokens=10,
        repetitions=2,
    )
    return dataclasses.replace(chosen, **changes)


def quietly(settings: Settings) -> Report:
    return measure(settings, warn=lambda _: None)


def test_two_servers_with_one_text_in_turn(make: Make, prompts: Path) -> None:
    plain, saguaro = make(), make(drafts=3)
    report = quietly(settings_of(prompts, plain, saguaro, concurrency=(1, 3)))
    assert [run.name for run in report.runs] == [
        "plain, 1 at once, T=0",
        "saguaro, 1 at once, T=0",
        "plain, 3 at once, T=0",
        "saguaro, 3 at once, T=0",
    ]
    for run in report.runs:
        assert [one.tokens for one in run.repetitions] == [60, 60]
        assert all(len(one.first_token_seconds) == 6 for one in run.repetitions)
        pieces = 10 if run.server == "plain" else 4
        assert all(len(one.gap_seconds) == 6 * (pieces - 1) for one in run.repetitions)
        assert all(one.differing == {} for one in run.repetitions)
        assert run.repetitions[0].digests == report.runs[0].repetitions[0].digests
    assert (plain.most_at_once, saguaro.most_at_once) == (3, 3)
    assert report.notes == []
    assert report.servers["saguaro"]["is_saguaro"]
    assert not report.servers["plain"]["is_saguaro"]


def test_hit_rate_and_acceptance_are_those_of_the_measured_part(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(drafts=3)))
    plain, saguaro = (summarise(report.runs)[run.name] for run in report.runs)
    assert saguaro.hit_rate == 0.75
    assert saguaro.acceptance == 0.5
    assert saguaro.accepted_by_position == [1.0]
    assert saguaro.misses == {"late": 2 * 6 * 4}  # repetitions, prompts, rounds: the warm-up is not among them
    assert saguaro.target_wait_seconds == pytest.approx(0.002)
    assert saguaro.same_text == [12, 12]
    assert (plain.hit_rate, plain.acceptance, plain.over_first) == (None, None, None)
    assert saguaro.over_first is not None
    assert saguaro.over_first.low <= saguaro.over_first.median <= saguaro.over_first.high


def test_texts_that_differ_are_named(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(odd={"p2": 7, "p5": 0})))
    assert [one.differing for one in report.runs[1].repetitions] == [{2: 7, 5: 0}] * 2
    text = report_text(report, summarise(report.runs))
    assert "saguaro: another text for the prompts 2 (from place 7), 5 (from place 0)" in text
    assert "no: 8/12" in text


def test_without_ids_texts_are_compared(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(odd={"p2": 7}, ids=False)))
    (found,) = {tuple(one.differing or {}) for one in report.runs[1].repetitions}
    assert found == (2,)
    assert [one.tokens for one in report.runs[1].repetitions] == [60, 60]


def test_sampled_texts_are_not_compared(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(odd={"p1": 0}), temperature=(1.0,)))
    assert all(one.differing is None for run in report.runs for one in run.repetitions)
    assert report.summaries["saguaro, 1 at once, T=1"]["same_text"] is None


def test_a_reference_that_does_not_repeat_itself_is_said(make: Make, prompts: Path) -> None:
    plain = make()
    settings = settings_of(prompts, plain)

    class Turning:
        """One prompt has another text from the second time on; it is not among those of the warm-up."""

        times = 0

        def get(self, key: str, default: int) -> int:
            self.times += key == "p4"
            return 5 if key == "p4" and self.times > 1 else default

    plain.odd = Turning()  # type: ignore[assignment]
    report = quietly(settings)
    assert report.notes == [
        "plain itself gives another greedy text for 1 of 6 prompts from one repetition to the next (1 at once, T=0): "
        "its batches are not invariant"
    ]


def test_who_else_is_served_is_said(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(others=5)))
    assert report.notes == ["plain made 30 tokens for others while it was measured (1 at once, T=0)"]


def test_drafts_that_are_never_there_are_said(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(drafts=2, hits=0)))
    assert report.notes == [
        "saguaro, 1 at once, T=0: no table was ever there when it was needed; is the draft side running?"
    ]


def test_a_server_without_metrics_is_measured_all_the_same(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(metrics=False)))
    assert report.notes == ["plain shows no /metrics: no hit rate and no acceptance of it"]
    assert report.runs[0].repetitions[0].counters == {}


def test_a_chat_has_the_prompt_as_a_users_message(make: Make, prompts: Path) -> None:
    server, other = make(), make(odd={"p3": 2})
    report = quietly(settings_of(prompts, server, other, chat=True))
    assert all(
        body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}] for body in server.bodies
    )
    assert not any("prompt" in body for body in server.bodies)
    assert [one.tokens for one in report.runs[0].repetitions] == [60, 60]
    assert [one.differing for one in report.runs[1].repetitions] == [{3: 2}] * 2


@pytest.mark.parametrize("cached", [False, True])
def test_prompts_that_come_again_are_salted_unless_the_cache_is_asked_for(
    cached: bool, make: Make, prompts: Path
) -> None:
    server = make()
    quietly(settings_of(prompts, server, prefix_cache=cached))
    salts = [body.get("cache_salt") for body in server.bodies if body["max_tokens"] == 10 and body["prompt"] == "p5"]
    assert len(salts) == 2
    assert len(set(salts)) == (1 if cached else 2)
    assert (None in salts) == cached
    assert all(body["ignore_eos"] and body["model"] == "pair" for body in server.bodies)


def test_a_second_run_does_not_find_the_prompts_of_the_first(make: Make, prompts: Path) -> None:
    server = make()
    settings = settings_of(prompts, server)
    quietly(settings)
    first = {body["cache_salt"] for body in server.bodies}
    quietly(settings)
    assert first.isdisjoint(body["cache_salt"] for body in server.bodies[len(server.bodies) // 2 :])


@pytest.mark.parametrize("texts", [2, 8])
def test_metrics_that_fail_meanwhile_end_it(texts: int, make: Make, prompts: Path) -> None:
    """Two texts are the warm-up, six the measured part."""
    with pytest.raises(ServerError, match=r"plain: .*/metrics answers 503: too busy"):
        quietly(settings_of(prompts, make(blind_after=texts)))


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        ("refused", "plain answers 400: this prompt is too long"),
        ("short", "plain made 9 tokens of 10"),
        ("no end", "plain: a text ended without its last line"),
        ("error", "the engine died"),
        ("hangs", "plain: no end of a text after 0.5 s"),
    ],
)
def test_a_text_that_fails_ends_it(flaw: str, complaint: str, make: Make, prompts: Path) -> None:
    with pytest.raises(ServerError, match=complaint):
        quietly(settings_of(prompts, make(flaw=flaw), timeout=0.5))


@pytest.mark.parametrize(
    ("how", "changes", "kind", "complaint"),
    [
        ({"models": ("a", "b")}, {}, ServerError, "plain serves a, b: name one with --model"),
        ({}, {"model": "nothing"}, ServerError, "plain serves pair, not nothing"),
        ({"longest": 10}, {}, SettingsError, "plain holds texts of 10 tokens, prompt included: write fewer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    how: dict[str, Any], changes: dict[str, Any], kind: type[Exception], complaint: str, make: Make, prompts: Path
) -> None:
    server, other = make(**how), make()
    with pytest.raises(kind, match=complaint):
        quietly(settings_of(prompts, server, other, **changes))
    assert server.bodies == other.bodies == []


def test_nothing_is_sent_to_one_where_the_other_is_not_there(make: Make, prompts: Path) -> None:
    server = make()
    settings = settings_of(prompts, server)
    with pytest.raises(ServerError, match=r"gone: http://127\.0\.0\.1:1/v1/models does not answer"):
        quietly(dataclasses.replace(settings, servers=(*settings.servers, ("gone", "http://127.0.0.1:1"))))
    assert server.bodies == []


def test_different_models_are_said(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(models=("other",))))
    assert report.notes == [
        "the servers serve different models (/models/other, /models/pair): ratios compare these, too"
    ]


def test_the_report_is_plain_json_with_its_origin(make: Make, prompts: Path) -> None:
    report = quietly(settings_of(prompts, make(), make(drafts=3)))
    read = json.loads(json.dumps(report.to_json()))
    assert (read["schema"], read["kind"]) == (1, "servers")
    assert {"date", "command", "git", "versions", "processor"} <= read["provenance"].keys()
    assert read["settings"]["servers"].keys() == {"plain", "saguaro"}
    assert read["servers"]["saguaro"]["version"] == "0.32.0"
    assert read["summaries"]["saguaro, 1 at once, T=0"]["hit_rate"] == 0.75
    with pytest.raises(ValueError, match="a report of servers"):
        records.Report.from_json(read)


def test_no_password_is_in_the_report(make: Make, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(prompts, make(), make())
    (plain, url), (other, second) = settings.servers
    place, its = url.removeprefix("http://"), second.removeprefix("http://")
    secret = (plain, f"http://me:it's@{place}"), (other, f"http://it's@{its}")
    words = ["bench", "--against-server", f"me:it's@{place}/v1", f"{other}=http://it's@{its}"]
    monkeypatch.setattr(sys, "argv", words)
    report = quietly(dataclasses.replace(settings, servers=secret))
    assert report.provenance["command"] == f"python bench --against-server {place}/v1 {other}=http://{its}"
    assert "it's" not in json.dumps(report.to_json())


def test_loads_are_every_pair() -> None:
    chosen = Settings((), concurrency=(1, 2), temperature=(0.0, 1.0))
    assert chosen.loads() == [Load(1, 0.0), Load(1, 1.0), Load(2, 0.0), Load(2, 1.0)]
