"""Both sides of the loop under every interleaving that hypothesis can think of, checked after every move.

The default run is short and always the same. A longer one, with other moves each time:

    python -c "from tests.unit.test_state_machine import run_longer; run_longer(examples=2000, moves=100)"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.state_machine import planted
from tests.unit.state_machine.machine import SpeculationMachine, World
from tests.unit.state_machine.two_sides import MISSES

SEEN_AT_LEAST = (
    *("hit", "late table", *MISSES, "right draft, greedy", "right draft, coupled", "right draft, sampled", "right q"),
    *("ended", "piece of a prompt", "fewer drafts scheduled", "drafts dropped by preemption", "quiet step"),
    *("end that was not said", "end and arrival at once", "finished table", "gone"),
)
WORLDS = {
    "roomy": World(SEEN_AT_LEAST, examples=30),
    "few blocks": World(("hit", "no room for a table"), num_blocks=16),
    "all certain": World(("hit", "right draft, sampled"), method="greedy"),
    "small ring": World(("hit", "step refused"), num_blocks=26, ring_bytes=240, backup="ngram"),
    "just in time": World(("hit", "backup: jit", "late branch went on"), backup="jit", examples=15),
    "n-gram": World(("hit", "backup: ngram"), backup="ngram"),
    "restarts": World(("hit", "restart"), backup="auto", fate="restarts"),
    "dies": World(("hit", "death"), backup="jit", fate="dies"),
}
SHORT = settings(stateful_step_count=40, deadline=None, derandomize=True)


def run(name: str, how: settings) -> Counter[str]:
    """Run the machine in one of the worlds; what happened there, by name."""
    world, seen = WORLDS[name], Counter[str]()
    machine = type("Machine", (SpeculationMachine,), {"world": world, "reached": seen})
    run_state_machine_as_test(seed(list(WORLDS).index(name))(machine) if how.derandomize else machine, settings=how)
    return seen


def run_longer(examples: int, moves: int) -> None:
    """Other moves each time, in every world, for an hour or a night."""
    for name in WORLDS:
        run(name, settings(max_examples=examples, stateful_step_count=moves, deadline=None))


@pytest.mark.parametrize("world", WORLDS)
def test_whatever_happens_in_whatever_order_the_two_sides_agree(world: str) -> None:
    seen = run(world, settings(SHORT, max_examples=WORLDS[world].examples))
    missing = [event for event in WORLDS[world].must_see if not seen[event]]
    assert not missing, f"the run no longer gets as far as: {missing}"


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    planted.a_miss_does_not_cut_valid_back: "roomy",
    planted.dropped_branches_keep_their_blocks: "roomy",
    planted.a_table_is_looked_up_whatever_its_stamp: "roomy",
    planted.no_block_is_copied_on_write: "roomy",
    planted.blocks_are_given_back_while_the_tree_grows: "roomy",
    planted.a_release_that_was_refused_is_forgotten: "small ring",
    planted.a_tree_that_is_stopped_is_not_begun_again: "roomy",
    planted.a_slot_is_not_given_back: "roomy",
}
"""Where each of them is found."""


@pytest.mark.parametrize(("plant", "world"), PLANTED.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_error_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError, ExceptionGroup)):
        run(world, settings(SHORT, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False))
