"""The draft engine whose outcomes never reach the host: what the host does for it, in the order of one stream.

The host knows which request holds which slot, its prompt and how it samples; it owns the KV blocks, has prompts read,
and says how many rows a round has. The rest is `DeviceRound`, on the device.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.buckets import MAX_ROWS, Bucket, branches_for, bucket_of, buckets
from vllm_saguaro.drafting.device_blocks import BlockLedger
from vllm_saguaro.drafting.device_model import DeviceModel
from vllm_saguaro.drafting.device_round import DeviceRound
from vllm_saguaro.drafting.late_lengths import GIVEN_UP, LateLengths, Mark
from vllm_saguaro.drafting.readings import Readings
from vllm_saguaro.drafting.slot_state import SlotState
from vllm_saguaro.kernels.operations import Operations
from vllm_saguaro.messages import Sampling

METHODS = ("coupled", "probabilistic", "greedy")


@dataclass(slots=True)
class Tenant:
    """A request that is drafted for: it had `length` tokens after step number `step`, and at most K + 1 more a step."""

    length: int
    step: int


class DeviceEngine:
    """Requests by slot, their blocks, and the rounds of all. No call waits for the device.

    A request that the draft cannot hold (no room, too long, a token that the draft does not know) has no tenant: its
    outcomes are misses until it leaves.
    """

    def __init__(
        self,
        model: DeviceModel,
        operations: Operations,
        num_speculative_tokens: int,
        slots: int,
        branches: int,
        mark: Callable[[], Mark],
        method: str = "probabilistic",
        sampling_c: float = 1.0,
        seed: int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`slots`: requests at once. `branches`: N, at most; a batch of many requests has fewer (`buckets`).

        `mark`: see `LateLengths`. `method`: at a positive temperature "coupled" drafts what the target's noise picks,
        which must be known of every request (`messages.Noise.POSITION`), "probabilistic" draws from q, "greedy" drafts
        the likeliest token. `sampling_c`: C of Saguaro sampling where drafts are drawn from q, 1 for none. `seed` of
        the noise of those; None: a secret from the system. ValueError for an unknown method.
        """
        if method not in METHODS:
            raise ValueError(f"the method {method!r} is none of {', '.join(METHODS)}")
        self.model, self.num_speculative_tokens = model, num_speculative_tokens
        self.buckets = buckets(slots, branches, max_rows)
        self._max_rows, self._branches, self._certain = max_rows, branches, method != "probabilistic"
        coupled = method == "coupled"
        self.sampling_c = None if self._certain else sampling_c
        """C of Saguaro sampling; None where nothing is drawn from a q."""
        self.ledger = BlockLedger(model.num_blocks, model.block_size, model.max_length, num_speculative_tokens)
        shape = (slots, branches, num_speculative_tokens, self.ledger.width, self.ledger.private_blocks)
        self.state = SlotState.empty(model, *shape, with_q=not coupled)
        secret = secrets.randbits(63) if seed is None else seed
        self.round = DeviceRound(model, operations, self.state, slots, secret, sampling_c, coupled)
        for bucket in self.buckets:  # now, so that whoever measures memory next finds them all
            self.round.rows(bucket)
        self._readings = Readings(model, self.state)
        self._lengths = LateLengths(self.state.length, self.state.alive, mark)
        self._tenants: dict[int, Tenant] = {}
        self._admissions = 0
        self._written_into = 0
        self._written = torch.zeros_like(self.round.step.q_tokens)

    @property
    def resident_bytes(self) -> int:
        """What is held on the device for good, with the model's weights and KV."""
        return self.model.resident_bytes + self.round.resident_bytes + self._written.nbytes

    def drafts_for(self, slot: int) -> bool:
        """Whether the slot has a request that is drafted for, or will be once its prompt is read."""
        return slot in self._tenants

    # ---- requests ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self, slot: int, token_ids: Sequence[int], sampling: Sampling) -> bool:
        """A request is in the slot, with this text. False where it cannot be drafted for."""
        self.release(slot)
        model, length = self.model, len(token_ids)
        if not 0 < length <= model.max_length or max(token_ids) >= model.vocab_size:
            return False
        branches = branches_for(len(self._tenants) + 1, self._branches, self._max_rows)
        holding = self.ledger.admit(slot, length, branches)
        if holding is None:
            return False
        self._admissions += 1
        certain = self._certain or sampling.greedy
        self.state.admit(slot, length, sampling, certain, self._admissions)
        self.state.give_blocks(slot, holding.main, holding.private)
        self._tenants[slot] = Tenant(length, self._lengths.step)
        self._readings.add(slot, token_ids)
        self._readings.read_on()
        return True

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Nobody is in the slot, or nobody who is drafted for."""
        if self._tenants.pop(slot, None) is not None:
            self._readings.drop(slot)
            self.ledger.release(slot)
            self.state.forget(slot)

    # ---- a step of the target ----------------------------------------------------------------------------------

    def bucket(self, batch: int) -> Bucket:
        """The bucket of a step with `batch` rows."""
        return bucket_of(self.buckets, batch)

    @torch.inference_mode()
    def take_in(self, outcomes: DeviceOutcomes, bucket: Bucket) -> None:
        """The outcomes of a step, into the buffers of the round; rows that are left are padding."""
        step, batch, size = self.round.step, outcomes.slots.shape[0], bucket.batch
        for buffer, given in (
            (step.slots, outcomes.slots),
            (step.accepted, outcomes.accepted),
            (step.verified, outcomes.verified),
            (step.bonus, outcomes.bonus),
            (step.lengths, outcomes.lengths),
        ):
            buffer[:batch].copy_(given)
        if batch < size:
            step.slots[batch:size].fill_(self.state.nobody)
            step.accepted[batch:size].fill_(-1)

    @torch.inference_mode()
    def look_up(self, bucket: Bucket) -> None:
        """Find the drafts of the outcomes; see `drafts`."""
        self.round.look_up(bucket)

    def drafts(self, batch: int) -> DeviceDrafts:
        """What was found for the `batch` rows of the step: views of buffers."""
        return DeviceDrafts(self.round.step.tokens[:batch], self.round.step.ready[:batch])

    @torch.inference_mode()
    def make_room(self, outcomes: DeviceOutcomes) -> None:
        """Blocks for what the texts may have become.

        A request for which there are none is drafted for no more, nor is one that the device has given up.
        """
        for slot, length, step in self._lengths.news():
            tenant = self._tenants.get(slot)
            if tenant is None or step <= tenant.step:  # of a request that was there before
                continue
            if length == GIVEN_UP:
                self.release(slot)
            else:
                tenant.length, tenant.step = length, step
        self._lengths.send(list(self._tenants))
        places: list[tuple[int, int, int]] = []
        for slot in outcomes.slots_on_host.tolist():
            tenant = self._tenants.get(slot)
            if tenant is None:
                continue
            steps = self._lengths.step - tenant.step
            most = min(tenant.length + (self.num_speculative_tokens + 1) * steps, self.model.max_length)
            grown = self.ledger.grow(slot, most)
            if grown is None:
                self.release(slot)
                continue
            first, more = grown
            places += [(slot, first + i, block) for i, block in enumerate(more)]
        # A request that was given up gave its blocks to others in this very step: only its own places are void.
        places = [place for place in places if place[0] in self._tenants]
        if places:
            self.state.more_blocks(places)

    @torch.inference_mode()
    def work(self, bucket: Bucket) -> None:
        """The round: from the outcomes to the next table."""
        self.round.work(bucket)

    @torch.inference_mode()
    def read_on(self, outcomes: DeviceOutcomes) -> None:
        """Read on in the prompts that are not read yet."""
        slots = outcomes.slots_on_host.tolist()
        others = any(slot in self._tenants and slot not in self._readings for slot in slots)
        self._readings.next_step(slots, others)
        self._readings.read_on()

    @torch.inference_mode()
    def logits_into(self, outcomes: DeviceOutcomes, draft_logits: Tensor) -> None:
        """T * log q of the drafts of this step into `draft_logits` [R, K, V], by slot; -inf beside the candidates.

        Only what was written before is taken back, so nobody else may write there. On the current stream.
        """
        if self._written_into != draft_logits.data_ptr():
            draft_logits.fill_(-torch.inf)
            self._written_into = draft_logits.data_ptr()
        batch, step = outcomes.slots.shape[0], self.round.step
        # Filler is whatever was sampled: an id that is none would be an illegal access, on the target's own stream.
        tokens, log_q = step.q_tokens[:batch].clamp(0, draft_logits.shape[-1] - 1), step.log_q[:batch]
        temperature = torch.where(outcomes.temperature > 0, outcomes.temperature, 1.0)  # a greedy row asks for no q
        slots = outcomes.slots.view(-1, 1, 1)
        depth = torch.arange(self.num_speculative_tokens, device=slots.device).view(1, -1, 1)
        nothing = draft_logits.new_full((), -torch.inf)  # a number of the host's would be copied, and waited for
        draft_logits[slots, depth, self._written[outcomes.slots]] = nothing
        draft_logits[slots, depth, tokens] = (temperature.view(-1, 1, 1) * log_q).to(draft_logits.dtype)
        self._written[outcomes.slots] = tokens

    # ---- graphs ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def idle(self) -> None:
        """Leave nothing but padding in the buffers: a round then changes nothing that matters."""
        self.round.step.slots.fill_(self.state.nobody)
        self.round.step.accepted.fill_(-1)

    def prepare(self, bucket: Bucket) -> None:
        """Make the model's forwards of a bucket fit for a CUDA graph."""
        for rows in self.round.rows(bucket):
            self.model.prepare(rows)

    def close(self) -> None:
        """The end: the model gives back what it has."""
        self._tenants.clear()
        self.model.close()
