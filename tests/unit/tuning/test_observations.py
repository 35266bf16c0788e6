from __future__ import annotations

import json

import pytest

from vllm_saguaro.tuning.observations import MOST_TIMES, Observations


def seen() -> Observations:
    found = Observations()
    for seconds in (0.01, 0.03, 0.02):
        found.add_pass(1, 5, seconds)
    found.add_table(2, 3, 0.004)
    found.ranks.update([0, 0, 0, 5, 11])
    found.not_predicted = 5
    found.add_drafts(verified=4, accepted=2)
    found.add_drafts(verified=4, accepted=4)
    found.add_drafts(verified=2, accepted=2)
    return found


def test_drafts_count_up_to_the_first_that_was_refused() -> None:
    found = seen()
    assert found.tried == [3, 3, 2, 1]
    assert found.accepted == [3, 3, 1, 1]
    assert found.chances(4, least=1) == [1.0, 1.0, 0.5, 1.0]


def test_a_place_that_was_seldom_seen_is_like_the_one_before_it() -> None:
    assert seen().chances(5, least=2) == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert seen().chances(3, least=100) == [1.0, 1.0, 1.0]
    assert Observations().chances(2) == [0.0, 0.0]


@pytest.mark.parametrize(("branches", "rate"), [(1, 0.3), (5, 0.3), (6, 0.4), (12, 0.5), (99, 0.5)])
def test_the_hit_rate_is_the_share_of_outcomes_below_a_rank(branches: int, rate: float) -> None:
    assert seen().hit_rate(branches) == rate


def test_without_outcomes_nothing_hits() -> None:
    assert Observations().hit_rate(4) == 0


def test_json_keeps_medians_and_counts() -> None:
    sent = json.loads(json.dumps(seen().to_json()))
    assert sent["passes"] == [[1, 5, 0.02, 3]]
    back = Observations.from_json(sent)
    assert back.passes == {(1, 5): [0.02] * 3}
    assert back.tables == {(2, 3): [0.004]}
    assert (back.tried, back.accepted, back.not_predicted) == ([3, 3, 2, 1], [3, 3, 1, 1], 5)
    assert back.hit_rate(6) == 0.4


def test_parts_are_added_up() -> None:
    more = Observations()
    more.add_pass(1, 5, 0.05)
    more.add_drafts(verified=6, accepted=5)
    more.ranks[0] += 10
    whole = Observations.together([seen(), more, Observations()])
    assert whole.passes[1, 5] == [0.01, 0.03, 0.02, 0.05]
    assert whole.tried == [4, 4, 3, 2, 1, 1]
    assert whole.accepted == [4, 4, 2, 2, 1, 0]
    assert whole.outcomes == 20


def test_no_more_times_are_kept_than_a_median_needs() -> None:
    found = Observations()
    for _ in range(MOST_TIMES + 5):
        found.add_pass(1, 1, 0.5)
    assert len(found.passes[1, 1]) == MOST_TIMES
