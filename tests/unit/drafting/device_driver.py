"""A target for the device engine: texts by slot, outcomes as a step would bring them, and what must hold after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.algorithm.position_noise import gumbel_of_all, stem_of
from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.kernels.operations import TWINS, Operations
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.side_stream import InlineStream, SideStream
from vllm_saguaro.placement.stream import StreamDraft

Outcome = tuple[int, int]
"""(k, t*)"""
ANOTHER = 77
"""A token of the target's that the draft does not know: its vocabulary is smaller."""


@dataclass(slots=True)
class Request:
    """A request as the target has it: its text, and the real drafts that are under verification."""

    name: str
    sampling: Sampling
    text: list[int]
    drafts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Given:
    """What came of one step: by row, whether it was a hit, and the drafts."""

    hits: list[bool]
    drafts: list[list[int]]


class World:
    """A stream draft over a fake model, and the requests of a target."""

    def __init__(
        self,
        model: FakeDeviceModel,
        *,
        slots: int = 4,
        drafts: int = 3,
        branches: int = 4,
        operations: Operations = TWINS,
        stream: SideStream | None = None,
        make: Callable[..., DeviceEngine] = DeviceEngine,
        **options: Any,
    ) -> None:
        self.model, self.drafts = model, drafts
        stream = stream or InlineStream()
        self.engine = make(model, operations, drafts, slots, branches, stream.mark, **{"seed": 11, **options})
        self.draft = StreamDraft(self.engine, stream)
        self._quiet()
        self.requests: dict[int, Request] = {}
        self.hits = self.tables_seen = 0
        self._names = 0

    # ---- what a runner does ------------------------------------------------------------------------------------

    def admit(self, slot: int, text: Sequence[int], sampling: Sampling | None = None) -> Request:
        self._names += 1
        sampling = replace(sampling or Sampling(), prompt_length=len(text))
        request = Request(f"request {self._names}", sampling, list(text))
        self.requests[slot] = request
        self.draft.admit(slot, request.name, list(text), sampling)
        assert self.draft.alive
        self._quiet()
        return request

    def release(self, slot: int) -> None:
        self.draft.release(slot, self.requests.pop(slot).name)
        self._quiet()

    def step(self, found: Mapping[int, Outcome | None]) -> Given:
        """One step of the target with these slots, in this order; None: the row gets no token."""
        outcomes = self.outcomes(found)
        expected = [self._expected(slot, outcome) for slot, outcome in found.items()]
        given = self.draft.exchange(outcomes)
        assert self.draft.alive
        self._quiet()
        self._check_given(given, outcomes)
        rows = []
        for row, (slot, outcome) in enumerate(found.items()):
            tokens, ready = given.tokens[row].tolist(), int(given.ready[row])
            wanted = expected[row]
            assert ready == (0 if wanted is None else self.drafts), "a hit that is none, or a miss that should be a hit"
            assert wanted is None or tokens == wanted, "the drafts of another branch"
            if outcome is not None:
                request = self.requests[slot]
                request.text += [*request.drafts[: outcome[0]], outcome[1]]
                request.drafts = tokens[:ready]
            rows.append((wanted is not None, tokens[:ready]))
            self.hits += wanted is not None
        given.tokens.fill_(-1)  # the runner may, where fewer than K are scheduled
        self.check()
        return Given([hit for hit, _ in rows], [drafts for _, drafts in rows])

    def outcomes(self, found: Mapping[int, Outcome | None], verified: Sequence[int] | None = None) -> DeviceOutcomes:
        """As a runner says it; `verified` drafts of each row were in the pass, all of them where it is left out."""
        slots = list(found)
        accepted = [-1 if o is None else o[0] for o in found.values()]
        verified = [self.drafts] * len(slots) if verified is None else verified
        bonus = [0 if o is None else o[1] for o in found.values()]
        lengths = [12345 if o is None else len(self.requests[slot].text) + o[0] + 1 for slot, o in found.items()]
        temperature = [self.requests[slot].sampling.temperature for slot in slots]
        device = self.engine.model.device
        return DeviceOutcomes(
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            accepted=torch.tensor(accepted, dtype=torch.int32, device=device),
            verified=torch.tensor(verified, dtype=torch.int32, device=device),
            bonus=torch.tensor(bonus, dtype=torch.int64, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
            request_ids=[self.requests[slot].name for slot in slots],
            slots_on_host=np.array(slots, dtype=np.int64),
        )

    def _quiet(self) -> None:
        """Nothing is looked at while a stream is still at work on it."""
        device = self.engine.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # ---- what the draft has ------------------------------------------------------------------------------------

    def reads(self, slot: int) -> bool:
        """Whether the draft has the text of this slot."""
        state = self.engine.state
        return bool(state.alive[slot]) and bool(state.ready[slot])

    def table(self, slot: int) -> list[tuple[Outcome, list[int], int]]:
        """The branches of a slot: its outcome, its drafts, and which of the N it is."""
        state = self.engine.state
        if int(state.depth[slot]) == 0 or not self.reads(slot):
            return []
        keys = zip(state.accepted_keys[slot].tolist(), state.bonus_keys[slot].tolist(), strict=True)
        return [
            ((k, bonus), state.drafts[slot, branch].tolist(), branch)
            for branch, (k, bonus) in enumerate(keys)
            if k >= 0
        ]

    def _expected(self, slot: int, outcome: Outcome | None) -> list[int] | None:
        """The drafts that the table of before holds for this outcome; None: a miss."""
        return next((drafts for key, drafts, _ in self.table(slot) if key == outcome), None)

    # ---- what must hold ----------------------------------------------------------------------------------------

    def check(self) -> None:
        self._check_blocks()
        for slot, request in self.requests.items():
            if not self.reads(slot):
                continue
            self._check_kv(slot, request)
            self._check_table(slot, request)

    def _check_given(self, given: DeviceDrafts, outcomes: DeviceOutcomes) -> None:
        batch = outcomes.slots.shape[0]
        assert given.tokens.shape == (batch, self.drafts)
        assert (given.tokens.dtype, given.ready.dtype) == (torch.int64, torch.int32)
        for row in range(batch):
            if not given.ready[row]:
                filler = int(outcomes.bonus[row])
                assert given.tokens[row].tolist() == [filler] * self.drafts, "a filler is the bonus token"

    def _check_blocks(self) -> None:
        """Every block of a slot is in its tables once, and in nobody else's; free ones are wiped."""
        state, ledger, owned = self.engine.state, self.engine.ledger, set[int]()
        for slot in self.requests:
            if not self.engine.drafts_for(slot):
                assert not state.main[slot].any(), "a slot that is not drafted for has blocks"
                continue
            holding = ledger.holding(slot)
            branches = int(state.branches[slot])
            main = state.main[slot, : len(holding.main)].tolist()
            private = state.private[slot, :branches].flatten().tolist()
            assert sorted(main + private) == sorted(holding.main + holding.private), "the slot has other blocks"
            assert not state.main[slot, len(holding.main) :].any()
            assert 0 not in holding.main + holding.private
            assert not owned & {*holding.main, *holding.private}, "a block has two owners"
            owned |= {*holding.main, *holding.private}
        assert len(owned) + ledger.num_free == self.model.num_blocks - 1, "a block was lost"
        self.model.wipe(set(range(1, self.model.num_blocks)) - owned)
        self._quiet()

    def _check_kv(self, slot: int, request: Request) -> None:
        """The KV of the whole text is there, and of the drafts under verification."""
        state = self.engine.state
        text = request.text + request.drafts
        assert int(state.length[slot]) == len(request.text)
        assert int(state.under[slot]) == len(request.drafts) or not self.table(slot)
        if int(state.depth[slot]):
            assert self.model.text_at(state.main[slot].tolist(), len(text)) == text

    def _check_table(self, slot: int, request: Request) -> None:
        """Every branch says what the draft model says of its text, and no outcome is there twice or impossible."""
        state, branches = self.engine.state, self.table(slot)
        keys = [key for key, _, _ in branches]
        assert len(set(keys)) == len(keys)
        self.tables_seen += bool(branches)
        for (k, bonus), drafts, branch in branches:
            assert k <= len(request.drafts)
            assert k == len(request.drafts) or bonus != request.drafts[k], "a rejected draft is no bonus token"
            text = [*request.text, *request.drafts[:k], bonus]
            assert len(text) + self.drafts <= self.model.max_length
            if request.sampling.coupled:
                assert bool(state.noisy[slot])
                assert drafts == self.picked(text, request.sampling), "not what the noise picks"
                continue
            if bool(state.certain[slot]):
                assert drafts == self.model.language.greedy_continuation(text, self.drafts), "not what the draft says"
                continue
            for depth, draft in enumerate(drafts):
                tokens = state.q_tokens[slot, branch, depth].long()
                q = torch.zeros(self.model.vocab_size).scatter(0, tokens, state.log_q[slot, branch, depth].exp())
                torch.testing.assert_close(q, self.q_after(text, request.sampling), atol=1e-5, rtol=1e-4)
                assert q[draft] > 0
                text.append(draft)

    def picked(self, text: Sequence[int], sampling: Sampling) -> list[int]:
        """What the noise of each position picks from the draft's logits, one token after the other."""
        text, drafts = list(text), list[int]()
        for _ in range(self.drafts):
            drafts.append(picked(self.model.language.logits_after(text), len(text), sampling))
            text.append(drafts[-1])
        return drafts

    def q_after(self, text: Sequence[int], sampling: Sampling) -> torch.Tensor:
        """softmax(z / T) over the likeliest M, of a request without cuts."""
        z = self.model.language.logits_after(text) / sampling.temperature
        least = z.topk(min(SUPPORT, len(z))).values[-1]
        return z.masked_fill(z < least, -torch.inf).softmax(-1)


def picked(logits: torch.Tensor, position: int, sampling: Sampling) -> int:
    """argmax_t z_t / T + g_t at a text position, over the tokens that a top-k leaves; the other cuts are not looked at.

    What a target says that samples with this noise.
    """
    z = logits.double() / sampling.temperature
    if sampling.top_k:
        z = z.masked_fill(z < z.topk(sampling.top_k).values[-1], -torch.inf)
    noise = gumbel_of_all(torch.tensor([stem_of(sampling.seed, position)]), len(z))[0]
    return int((z + noise).argmax())
