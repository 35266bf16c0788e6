"""The seam to Model Runner V1 (vLLM 0.32 and 0.33, `v1/worker/gpu_model_runner.py`; the CPU runner is a subclass).

V1 in synchronous mode is a host-side runner: after bookkeeping it calls `propose_draft_token_ids` with the accepted
tokens as lists, row i belonging to `input_batch.req_ids[i]`, and takes ragged lists of drafts back; an empty list
costs nothing. That mode is reached with `disable_padded_drafter_batch`, which the constructor of vLLM's own
`DraftModelProposer` refuses: it is set on the worker's configuration after the runner has been made.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_saguaro.speculator import Speculator, Verified

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class SaguaroDrafter(DraftModelProposer):
    """Stands where the runner expects its own drafter, and asks the speculator.

    It is a `DraftModelProposer` only because the runner asserts so in several places; it has no model, no KV cache
    and no graphs in this process, so what the runner does to those is nothing here.
    """

    supports_mm_inputs = False
    model = None

    def __init__(self, speculator: Speculator, runner: GPUModelRunner) -> None:
        self.speculator = speculator
        self.runner = runner
        self.draft_attn_groups: list[Any] = []

    def load_model(self, target_model: Any) -> None:
        """The draft has been loading elsewhere while the target loaded here: wait for it."""
        self.speculator.channel.wait_until_ready()

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Profiling and warm-up runs of the target do not concern the draft."""

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """No attention in this process."""

    def initialize_cudagraph_keys(self, *args: Any, **kwargs: Any) -> None:
        """No graphs in this process."""

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before the target's forward: tell the draft side who came and who left."""
        arrived = [
            (new.req_id, new.prompt_token_ids, _temperature(new.sampling_params))
            for new in scheduler_output.scheduled_new_reqs
            if new.prompt_token_ids is not None and new.sampling_params is not None
        ]
        self.speculator.begin_step(arrived, list(scheduler_output.finished_req_ids))

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        *unused: Any,
    ) -> list[list[int]]:
        """Takes the place of the runner's method of this name (see the module's first lines)."""
        batch = self.runner.input_batch
        rows = [
            Verified(
                request_id,
                sampled,
                int(batch.num_tokens_no_spec[row]),
                functools.partial(self._tokens, row),
                functools.partial(self._request_temperature, request_id),
            )
            for row, (request_id, sampled) in enumerate(zip(batch.req_ids, sampled_token_ids, strict=True))
        ]
        return self.speculator.propose(rows, scheduler_output.num_spec_tokens_to_schedule)

    def _tokens(self, row: int) -> list[int]:
        batch = self.runner.input_batch
        return batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]].tolist()

    def _request_temperature(self, request_id: str) -> float:
        return _temperature(self.runner.requests[request_id].sampling_params)


def install(runner: GPUModelRunner, speculator: Speculator) -> SaguaroDrafter:
    """Put our drafter into a runner that has been made and has loaded nothing yet."""
    if not isinstance(runner.drafter, DraftModelProposer) or isinstance(runner.drafter, SaguaroDrafter):
        raise RuntimeError(f"vllm_saguaro: expected vLLM's own draft_model drafter, found {type(runner.drafter)}")
    drafter = SaguaroDrafter(speculator, runner)
    runner.drafter = drafter
    runner.propose_draft_token_ids = drafter.propose_draft_token_ids
    runner.speculative_config.disable_padded_drafter_batch = True
    # Past this length the runner drafts token 0 for the whole batch. The speculator knows each request's own limit.
    runner.effective_drafter_max_model_len = sys.maxsize
    return drafter


def _temperature(sampling_params: Any) -> float:
    """A request's temperature; it crosses as a float32, and beyond a point the prediction is uniform anyway."""
    return min(float(getattr(sampling_params, "temperature", 0.0) or 0.0), 1e6)
