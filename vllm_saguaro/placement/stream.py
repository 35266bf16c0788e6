"""`placement: stream`: the draft on the target's own device, on a stream of its own, without a thread.

The order in a step, all of it only enqueued:

    the target's stream    .. sampled |                  | result ready | verify of the next step ..
    the draft's stream       .. table | look up, gather  |  adopt, glue, fork, K branch steps: the next table ..

The look-up waits for the target's sampling, and by the draft stream's own order for the table it looks into. The target
waits for the look-up alone: the round is enqueued behind it, and runs while the target verifies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.buckets import Bucket, most_rows_first
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.drafting.graphs import CapturedCalls
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.side_stream import SideStream

logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm": only there has vLLM's logging a handler


class StreamDraft:
    """`DeviceDraft` over a `DeviceEngine`: made by `vllm_hooks.stream_draft.make_stream_draft`.

    An error of the draft ends the drafting, never a request: it is logged once, and every outcome is a miss from then
    on.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        stream: SideStream,
        first_use: Callable[[], None] = lambda: None,
        gave_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`first_use` is called once, before a capture or the first request: memory held back till then is let go.

        `gave_up` is called once, when an error has ended the drafting.
        """
        self.engine, self.alive = engine, True
        self.resident_bytes = engine.resident_bytes
        self._stream, self._first_use, self._gave_up = stream, first_use, gave_up
        self._calls = CapturedCalls(engine.model.device)
        self._requests: dict[int, str] = {}
        self._used = False
        self._branches = 0

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling, which is fixed here."""
        return self.engine.sampling_c if self.alive else None

    @property
    def branches(self) -> int | None:
        """Branches of a request in the newest round."""
        return self._branches if self.alive else 0

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """A request, new or resumed, holds this slot from now on, with these tokens; replaces what the slot held."""
        self._requests[slot] = request_id
        if not self.alive:
            return
        self._begin_use()
        try:
            with self._stream.entered():
                self.engine.admit(slot, token_ids, sampling)
        except Exception:
            self._give_up()

    def release(self, slot: int, request_id: str) -> None:
        """The request has left the slot; nothing happens where another has come since."""
        if self._requests.get(slot) != request_id:
            return
        del self._requests[slot]
        if not self.alive:
            return
        try:
            with self._stream.entered():
                self.engine.release(slot)
        except Exception:
            self._give_up()

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Look the outcomes up and gather their drafts; enqueue the round that makes the next table behind that."""
        batch = outcomes.slots.shape[0]
        if not self.alive:
            return self._nothing(outcomes)
        bucket = self.engine.bucket(batch)
        self._branches = bucket.branches
        try:
            self._stream.follow()
            with self._stream.entered():
                self.engine.take_in(outcomes, bucket)
                self._look_up(bucket)
            self._stream.lead()
            with self._stream.entered():
                self.engine.make_room(outcomes)
                self._work(bucket)
                self.engine.read_on(outcomes)
        except Exception:
            self._give_up()
            self._stream.lead()
            return self._nothing(outcomes)
        return self.engine.drafts(batch)

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        """Write q of the drafts just given into `draft_logits` [R, K, V] float32, on the target's stream.

        Where the draft has ended all rows are filler, and those are verified without a q.
        """
        if draft_logits is not None and self.alive:
            self.engine.logits_into(outcomes, draft_logits)

    def capture(self) -> None:
        """Capture a look-up and a round for each bucket, the most rows first. On a CPU there is nothing to capture.

        Where it is asked for again the graphs stay as they are: they hold nothing that is vLLM's.
        """
        stream = self._stream.cuda
        if stream is None or not self.alive or not self.engine.model.captures:
            return
        self._begin_use()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        engine = self.engine
        with torch.cuda.stream(stream):
            engine.idle()
        for bucket in most_rows_first(engine.buckets):
            self._calls.capture(("look up", bucket), partial(engine.look_up, bucket), lambda: None, stream)
            self._calls.capture(("work", bucket), partial(engine.work, bucket), partial(engine.prepare, bucket), stream)
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def close(self) -> None:
        """Wait for what is under way, and let go of everything."""
        self.alive = False
        self._stream.wait()
        self._calls.clear()
        self.engine.close()

    def _begin_use(self) -> None:
        if not self._used:
            self._used = True
            self._first_use()

    def _look_up(self, bucket: Bucket) -> None:
        self._calls.run(("look up", bucket), partial(self.engine.look_up, bucket))

    def _work(self, bucket: Bucket) -> None:
        self._calls.run(("work", bucket), partial(self.engine.work, bucket))

    def _nothing(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Filler for every row."""
        filler = torch.where(outcomes.accepted >= 0, outcomes.bonus, 0).unsqueeze(1)
        tokens = filler.repeat(1, self.engine.num_speculative_tokens)
        return DeviceDrafts(tokens, torch.zeros_like(outcomes.accepted))

    def _give_up(self) -> None:
        self.alive = False
        logger.exception("Saguaro: the draft failed; decoding goes on without drafts.")
        self._gave_up()
