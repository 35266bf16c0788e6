"""The process placement under vLLM's Model Runner V2: the target's device itself uses the mailbox of the draft process.

What the host knows (who comes, who leaves) goes through the mailbox's ring, as ever. What only the device knows goes
past the host: a step's outcomes leave as a record (`records.py`), by copies in stream order, and the tables are read by
kernels in stream order after sampling (`device_tables.py`), so that a table that is not there yet is simply a miss.
Neither host waits for the other, and ours waits for no device.

An admission is posted before the first outcome of its request is even enqueued, and the draft side empties the ring
before it takes a record: so it never sees an outcome of a request that it has not been told.

Stamps are the device's: the generation of a slot is set there when a request is admitted, in stream order, and the
round goes up with each outcome. A generation that the draft side was not told is never set: such a row reads as
generation 0, which no table has.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.messages import Admit, Release, Round, Sampling, Stamp, Step
from vllm_saguaro.placement.channel import LendingChannel, Traced
from vllm_saguaro.placement.device_q import LogitsWriter
from vllm_saguaro.placement.device_step import DeviceStep, GivenRows, StepOperations
from vllm_saguaro.placement.device_tables import TableReader
from vllm_saguaro.placement.layout import DEVICE_WORDS, MailboxShape
from vllm_saguaro.placement.records import NEWEST
from vllm_saguaro.placement.registered_memory import RegisteredMemory


class _Life:
    """The mailbox of one life of the draft side, as the device reaches it."""

    def __init__(
        self,
        memory: memoryview,
        shape: MailboxShape,
        device: torch.device,
        operations: StepOperations,
        with_q: bool,
    ) -> None:
        self._registered = RegisteredMemory(memory[: shape.ring_at if with_q else shape.q_at], device)
        host = self._registered.host[shape.tables_bytes // 8 : shape.q_at // 8]
        self.newest = host[NEWEST : NEWEST + 1]
        self.records = host[DEVICE_WORDS:].view(shape.device_steps, shape.record_words)
        self.reader = TableReader(self._registered.seen, shape, operations)
        self.number = 0
        """Of the newest record."""
        self.last_used: torch.cuda.Event | None = None
        """When the device had done what was enqueued of this life at its end."""

    def close(self) -> None:
        self._registered.close()


@dataclass(slots=True)
class _Given:
    """The drafts of the last `exchange`, and where their q is."""

    outcomes: DeviceOutcomes
    reader: TableReader
    rows: GivenRows


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that the draft side was told."""

    request_id: str
    stamp: Stamp


class MailboxDraft:
    """`DeviceDraft` over the mailbox of a draft process. All calls come from the runner's thread."""

    def __init__(
        self,
        channel: LendingChannel,
        shape: MailboxShape,
        device: torch.device,
        operations: StepOperations,
        log: logging.Logger,
        with_q: bool = True,
    ) -> None:
        """`channel`: the draft side, of mailboxes of this `shape`, which has `device_steps` and a slot for each of the
        runner's. `operations`: those for the device. `with_q`: whether drafts may be sampled, so that `logits_into`
        asks for their q.

        Raises ValueError for a shape without `device_steps`.
        """
        if not shape.device_steps:
            raise ValueError("a mailbox without device_steps cannot take outcomes from a device: give 1 or more")
        self._channel, self._shape, self._device = channel, shape, device
        self._do, self._log, self._with_q = operations, log, with_q
        self._step = DeviceStep(shape, device, operations)
        self._depths = torch.arange(shape.num_speculative_tokens, device=device)
        support = shape.support if with_q else 1
        self._q = LogitsWriter(shape.slots, shape.num_speculative_tokens, support, device)
        self.resident_bytes = self._step.resident_bytes + self._q.resident_bytes
        """Device memory held for good on the target's device; the draft's own is elsewhere."""
        self._generations = [0] * shape.slots
        self._requests: dict[int, _Request] = {}
        self._texts: dict[int, tuple[str, tuple[int, ...], Sampling]] = {}
        """By slot: requests of which no outcome was enqueued yet, so that the host knows their text."""
        self._unheard: list[Release] = []
        self._epoch = 0
        self._started = False
        """Whether a life was ready: what works no more later is not taken for a wrong setting."""
        self._life: _Life | None = None
        self._retired: list[_Life] = []
        self._given: _Given | None = None

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling that the draft side chose last."""
        return self._channel.sampling_c

    @property
    def branches(self) -> int | None:
        """Not known here: how many there are is read on the device alone."""
        return None

    def rounds(self) -> Sequence[Round]:
        """What the draft side was busy with since the last call. From any one thread."""
        return self._channel.rounds() if isinstance(self._channel, Traced) else []

    def wait_until_ready(self) -> None:
        """Return once the draft has loaded. Raises `DraftFailed` when it cannot, or is closed meanwhile."""
        self._channel.wait_until_ready()
        self._notice_lives()
        if self._life is not None:
            self._step.compile(self._life.reader, self._with_q)
        self._started = True

    # ---- what the host knows -----------------------------------------------------------------------------------

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """A request, new or resumed, has this slot from now on, and this text."""
        self._notice_lives()
        text = tuple(token_ids)
        self._texts[slot] = request_id, text, sampling
        former = self._requests.pop(slot, None)
        if former is not None:
            self._unheard.append(Release(former.stamp))
        self._tell(slot, request_id, text, sampling)

    def release(self, slot: int, request_id: str) -> None:
        """The request has left its slot."""
        self._notice_lives()
        if slot in self._texts and self._texts[slot][0] == request_id:
            del self._texts[slot]
        request = self._requests.get(slot)
        if request is not None and request.request_id == request_id:
            del self._requests[slot]
            self._step.state[slot].zero_()  # for one that takes the slot and is too long to be admitted
            self._unheard.append(Release(request.stamp))
            self._release_unheard()

    def _tell(self, slot: int, request_id: str, text: tuple[int, ...], sampling: Sampling) -> None:
        """Tell the draft side of a request, if there is one that can hold it; set the slot's stamp accordingly."""
        self._release_unheard()
        self._generations[slot] += 1
        stamp = Stamp(slot, self._generations[slot], 0)
        fits = len(text) + self._shape.num_speculative_tokens + 1 <= self._channel.max_length
        told = self._life is not None and fits and self._channel.post(Step(admits=[Admit(stamp, sampling, text)]))
        state = self._step.state[slot]
        state.zero_()
        if told:
            self._requests[slot] = _Request(request_id, stamp)
            state[0].fill_(stamp.generation)

    def _release_unheard(self) -> None:
        """Say who has left; again and again where the ring is full, since the draft side holds memory for them."""
        if self._unheard and (self._life is None or self._channel.post(Step(releases=self._unheard))):
            self._unheard = []

    # ---- lives of the draft side -------------------------------------------------------------------------------

    def _notice_lives(self) -> None:
        """Forget what a draft side that has ended knew, and reach for the mailbox of the one that is there now.

        The host does not know the texts of requests that decode: their tokens are on the device, which is ahead by a
        step or two. Those go without drafts until they leave. Requests that have not had an outcome yet are told anew.
        """
        for life in [life for life in self._retired if life.last_used is None or life.last_used.query()]:
            self._retired.remove(life)
            life.close()
        epoch = self._channel.epoch(0)
        if epoch == self._epoch:
            return
        ended, self._epoch = self._epoch, epoch
        self._retire()
        self._requests.clear()
        self._unheard = []
        self._step.state.zero_()
        if ended:
            self._log.error("The draft side has ended: decoding goes on without drafts until it is back.")
        if not epoch:
            return
        memory = self._channel.lend()
        if memory is None or self._channel.epoch(0) != epoch:  # it ended meanwhile: the next look finds what is there
            self._epoch = 0
            return
        try:
            self._life = _Life(memory, self._shape, self._device, self._do, self._with_q)
        except RuntimeError:
            if not self._started:
                raise
            self._log.exception("The draft side is back, but its memory is out of the device's reach: no drafts of it.")
            return
        if ended:
            self._log.info("The draft side is back: requests that arrive from now on are told to it.")
        for slot, (request_id, text, sampling) in self._texts.items():
            self._tell(slot, request_id, text, sampling)

    def _retire(self) -> None:
        """Keep the memory of a life that has ended until the device has done what is enqueued."""
        life, self._life, self._given = self._life, None, None
        if life is not None:
            if self._device.type == "cuda":
                life.last_used = torch.cuda.Event()
                life.last_used.record()
            self._retired.append(life)

    # ---- what the device knows ---------------------------------------------------------------------------------

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Look the outcomes up, and tell them to the draft side."""
        self._notice_lives()
        if self._texts:
            for slot in outcomes.slots_on_host.tolist():
                self._texts.pop(slot, None)
        life = self._life
        if life is None:
            bonus = outcomes.bonus.clamp(0, self._shape.vocab_size - 1)
            self._given = None
            tokens = bonus.unsqueeze(1).repeat(1, self._shape.num_speculative_tokens)
            return DeviceDrafts(tokens, torch.zeros_like(outcomes.accepted))
        self._release_unheard()
        given = self._step.take(life.reader.tables(outcomes.slots), outcomes)
        life.number += 1
        self._step.send_record(len(outcomes.slots), life.number, life.records, life.newest)
        self._given = _Given(outcomes, life.reader, given)
        return DeviceDrafts(given.tokens, given.ready)

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        """The q of the drafts that the last `exchange` gave for these outcomes.

        Drafts whose q is not there, is torn or is no distribution count as certain, which is as exact.
        """
        if draft_logits is None:
            return
        given, rows = self._given, (outcomes.slots, outcomes.slots_on_host)
        if given is None or given.outcomes is not outcomes or not self._with_q:
            self._q.write_certain(draft_logits, *rows, drafts.tokens.clamp(0, draft_logits.shape[-1] - 1))
            return
        found = given.rows
        tokens, probabilities, there = given.reader.proposals(outcomes.slots, found.stamps, found.branch)
        told = there.unsqueeze(1) & (self._depths < found.ready.unsqueeze(1))
        self._q.write(draft_logits, *rows, found.recorded, outcomes.temperature, tokens, probabilities, told)

    def capture(self) -> None:
        """Nothing is captured: a step is six kernels and two copies, whose addresses change with a restart."""

    def close(self) -> None:
        """End the draft side and let go of its memory, once the device has done with it."""
        self._channel.close()
        self._retire()
        self._epoch = 0
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
                torch.cuda.synchronize(self._device)
        for life in self._retired:
            life.close()
        self._retired.clear()
