"""Random lives of several requests in one engine, checked against the oracle after every event."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.drafting.checks import (
    COUPLED,
    GREEDY,
    SAMPLED,
    SEEDED,
    check_blocks,
    check_drafts,
    check_predictions,
    make_engine,
    prefill,
)
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import Trunk

VOCABULARY = 40
ROUNDS = 4
events = st.sampled_from(["hit", "hit", "hit", "hit, fewer drafts", "hit, no drafts", "miss", "elsewhere", "leave"])
tokens = st.integers(0, VOCABULARY - 1)


class Story:
    """One engine, its requests, and the text that each of them must have."""

    def __init__(self, draw: st.DataObject, num_blocks: int) -> None:
        self.data, self.num_blocks = draw, num_blocks
        self.steps = draw.draw(st.integers(1, 5), label="K")
        model = FakeModel(block_size=draw.draw(st.sampled_from([4, 8]), label="block size"), num_blocks=num_blocks)
        branches = draw.draw(st.integers(1, 6), label="N")
        deflations = Deflations(self.steps, draw.draw(st.sampled_from([1.0, 0.3]), label="C"))
        self.engine: DraftEngine = make_engine(model, self.steps, branches, deflations=deflations)
        self.texts: list[tuple[Trunk, list[int]]] = []
        for length in draw.draw(st.lists(st.integers(1, 18), min_size=1, max_size=3), label="prompts"):
            prompt = [(length * 5 + 3 * i) % VOCABULARY for i in range(length)]
            sampling = draw.draw(st.sampled_from([GREEDY, SAMPLED, COUPLED, SEEDED]), label="sampling")
            trunk = self.engine.admit(list(prompt), replace(sampling, prompt_length=length))
            self.texts.append((trunk, prompt))

    @property
    def trunks(self) -> list[Trunk]:
        return [trunk for trunk, _ in self.texts]

    def check(self) -> None:
        check_blocks(self.engine, self.trunks)
        for trunk, text in self.texts:
            assert trunk.tokens == text

    def turn(self, index: int) -> None:
        """Settle one request by a drawn event."""
        trunk, text = self.texts[index]
        event = self.data.draw(events, label="event")
        if event == "leave":
            self.engine.release(trunk)
            del self.texts[index]
            return
        depths = self.engine.drafts_of(trunk)
        if event.startswith("hit") and trunk.branches:
            i = self.data.draw(st.integers(0, len(trunk.branches) - 1), label="branch")
            k, bonus = trunk.branches[i].accepted, trunk.branches[i].bonus
            count = {"hit": len(depths), "hit, no drafts": 0}.get(event, len(depths) // 2)
            drafts, adopted = [int(depth[i]) for depth in depths[:count]], len(depths) > 0
        else:
            k = self.data.draw(st.integers(0, len(trunk.speculation)), label="k")
            bonus = self.data.draw(tokens, label="t*")
            count = self.steps if event == "elsewhere" else 0
            drafts = self.data.draw(st.lists(tokens, min_size=count, max_size=count), label="drafts")
            known = any((b.accepted, b.bonus) == (k, bonus) for b in trunk.branches)
            adopted = known and len(depths) > 0 and not drafts
        text += [*trunk.speculation[:k], bonus]
        result = self.engine.settle(trunk, k, bonus, drafts)
        if not drafts or event.startswith("hit"):
            assert result is adopted
        assert trunk.speculation == drafts

    def end_round(self, drafted: list[Trunk]) -> None:
        """Look at what was drafted, and settle every request."""
        for trunk in drafted:
            check_drafts(self.engine, trunk)
        for index in reversed(range(len(self.texts))):
            self.turn(index)
            self.check()

    def end(self) -> None:
        """All requests leave, and give back all that they had."""
        for trunk in self.trunks:
            self.engine.release(trunk)
        assert self.engine.pool.num_free == self.num_blocks


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_branch_of_every_story_drafts_the_oracles_continuation(data: st.DataObject) -> None:
    story = Story(data, num_blocks=256)
    for _ in range(ROUNDS):
        early = data.draw(st.sets(st.integers(0, 2), max_size=1), label="outcome before extension")
        fed = [trunk for i, trunk in enumerate(story.trunks) if i not in early]
        prefill(story.engine, fed, most=data.draw(st.sampled_from([3, 64]), label="chunk"))
        story.check()
        tree = story.engine.fork(fed) if fed else None
        for trunk in fed:
            check_predictions(story.engine, trunk)
        story.check()
        for _ in range(data.draw(st.integers(0, story.steps), label="depth") if tree else 0):
            assert tree is not None
            story.engine.grow(tree)
            story.check()
        story.end_round(fed)
    story.end()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 16))
def test_with_too_few_blocks_what_is_drafted_is_still_right(data: st.DataObject, num_blocks: int) -> None:
    story = Story(data, num_blocks)
    for _ in range(ROUNDS):
        waiting = story.trunks
        for _ in range(4):
            if waiting:
                story.engine.extend(waiting, 16)
            story.check()
        complete = [trunk for trunk in story.trunks if trunk.valid == trunk.length]
        tree = story.engine.fork(complete) if complete else None
        for _ in range(story.steps if tree else 0):
            assert tree is not None
            story.engine.grow(tree)
            story.check()
        story.end_round(complete)
    story.end()
