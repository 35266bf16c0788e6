"""A target under runner V2 in small, and draft sides for it: in this process, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.device_messages import DeviceDraft, DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Proposals, Sampling, Stamp, Step, Table
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox

CPU = torch.device("cpu")
SHAPE = MailboxShape(
    slots=4, branches=5, num_speculative_tokens=3, ring_bytes=1 << 14, support=40, vocab_size=40, device_steps=4
)
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.8)


class HostChannel:
    """One life after the other of a draft side in this process: nobody moves on that side unless it is told to."""

    resident_bytes = 0
    stalled_seconds = 0.0
    sampling_c: float | None = None

    def __init__(self, shape: MailboxShape = SHAPE, max_length: int = 64) -> None:
        self.shape, self.max_length = shape, max_length
        self.shards: Sequence[range] = (range(shape.slots),)
        self.life, self.alive, self.full = 0, False, False
        self.steps: list[Step] = []
        """All that the draft side has received."""
        self.begin()

    def begin(self) -> None:
        """The next life, in memory of its own."""
        self.life, self.alive = self.life + 1, True
        self.memory = bytearray(self.shape.total_bytes)
        self.target_end = Mailbox(memoryview(self.memory), self.shape)
        self.draft_end = Mailbox(memoryview(self.memory), self.shape)
        self.model = FakeModel(max_length=self.max_length, num_blocks=256, vocab_size=self.shape.vocab_size)
        engine = make_engine(self.model, self.shape.num_speculative_tokens, self.shape.branches)
        self.loop = DraftLoop(engine, self.draft_end.publish)

    def end(self) -> None:
        """The end of a life: its memory is there as long as somebody has it."""
        self.alive = False

    def take_in(self) -> list[Step]:
        """Let the draft side hear all that there is."""
        heard = []
        while self.draft_end.has_step:
            step = self.draft_end.receive()
            if step is not None:
                heard.append(step)
                self.loop.submit(step)
        self.steps += heard
        return heard

    def work(self, forwards: int = 100) -> None:
        """Hear all that there is, and do so many forwards."""
        self.take_in()
        for _ in range(forwards):
            if not self.loop.advance():
                break

    def epoch(self, slot: int) -> int:
        return self.life if self.alive else 0

    def post(self, step: Step) -> bool:
        return self.alive and not self.full and self.target_end.post(step)

    def lend(self) -> memoryview | None:
        return memoryview(self.memory) if self.alive else None

    def read(self, slot: int) -> Table | None:
        return self.target_end.read(slot)

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        return self.target_end.proposals(stamp, version, branch, depth)

    def wait_until_ready(self) -> None: ...

    def close(self) -> None:
        self.end()


def outcomes_of(
    rows: Sequence[tuple[int, int, int, int]],
    temperature: float = 0.0,
    device: torch.device = CPU,
    verified: int = SHAPE.num_speculative_tokens,
) -> DeviceOutcomes:
    """Of rows (slot, accepted, bonus, length); so many drafts were `verified` in each."""
    slots, accepted, bonus, lengths = (list(column) for column in zip(*rows, strict=True))
    return DeviceOutcomes(
        slots=torch.tensor(slots, device=device),
        accepted=torch.tensor(accepted, dtype=torch.int32, device=device),
        verified=torch.full((len(rows),), verified, dtype=torch.int32, device=device),
        bonus=torch.tensor(bonus, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        temperature=torch.full((len(rows),), temperature, device=device),
        request_ids=[f"r{slot}" for slot in slots],
        slots_on_host=np.array(slots),
    )


class SmallTarget:
    """Decodes greedily with the draft's own model, but every few tokens takes the second likeliest."""

    def __init__(
        self,
        draft: DeviceDraft,
        k: int = SHAPE.num_speculative_tokens,
        surprise: int = 5,
        device: torch.device = CPU,
    ) -> None:
        self.draft, self.k, self.surprise, self.device = draft, k, surprise, device
        self.model = FakeModel(max_length=4096)
        self.texts: dict[int, list[int]] = {}
        self.under_verification: dict[int, list[int]] = {}
        self.hits = self.rows = 0

    def admit(self, slot: int, text: Sequence[int], request_id: str | None = None) -> None:
        self.texts[slot], self.under_verification[slot] = list(text), []
        self.draft.admit(slot, request_id or f"r{slot}", text, GREEDY)

    def release(self, slot: int, request_id: str | None = None) -> None:
        del self.texts[slot], self.under_verification[slot]
        self.draft.release(slot, request_id or f"r{slot}")

    def next_token(self, text: Sequence[int]) -> int:
        likeliest = self.model.logits_after(text).topk(2).indices.tolist()
        return int(likeliest[sum(text) % self.surprise == 0])

    def step(self, slots: Sequence[int] | None = None, reading: Sequence[int] = ()) -> DeviceDrafts:
        """Verify what the slots have, and exchange; `reading`: slots whose prompt is not read to its end."""
        slots = list(self.texts) if slots is None else list(slots)
        rows = []
        for slot in slots:
            if slot in reading:
                rows.append((slot, -1, -5, 0))
                continue
            text, accepted = self.texts[slot], 0
            for token in self.under_verification[slot]:
                if self.next_token(text) != token:
                    break
                text.append(token)
                accepted += 1
            text.append(self.next_token(text))
            rows.append((slot, accepted, text[-1], len(text)))
        drafts = self.draft.exchange(outcomes_of(rows, device=self.device))
        self.check(rows, drafts)
        for row, (slot, accepted, _, _) in enumerate(rows):
            if accepted >= 0:
                self.under_verification[slot] = drafts.tokens[row, : int(drafts.ready[row])].tolist()
                self.hits += bool(self.under_verification[slot])
                self.rows += 1
        return drafts

    def check(self, rows: Sequence[tuple[int, int, int, int]], drafts: DeviceDrafts) -> None:
        """Real drafts are those that the draft model gives after this very text, and the others the bonus token."""
        assert drafts.tokens.shape == (len(rows), self.k)
        assert (drafts.tokens.dtype, drafts.ready.dtype) == (torch.int64, torch.int32)
        for row, (slot, accepted, bonus, _) in enumerate(rows):
            ready, tokens = int(drafts.ready[row]), drafts.tokens[row].tolist()
            if accepted < 0:
                assert ready == 0
                assert all(0 <= token < self.model.vocab_size for token in tokens)
                continue
            assert 0 <= ready <= self.k
            assert tokens[ready:] == [bonus] * (self.k - ready)
            assert tokens[:ready] == self.model.greedy_continuation(self.texts[slot], ready)
