"""What a vLLM worker with Model Runner V2 does for the draft, on whatever device: a mixin before vLLM's own class.

The worker sees everything in the right order: it makes the runner (`init_device`), loads the target and, after it, the
draft (`load_model`; so the draft's weights and KV are there when memory is profiled), is told of each step before the
forward (`execute_model`), and is shut down. vLLM 0.32 and 0.33, `v1/worker/gpu_worker.py`, `v1/worker/cpu_worker.py`.
Of the ranks of a tensor-parallel target the first has the draft, and tells the others (`device_ranks.py`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib

from vllm_saguaro import counters
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.device_messages import DeviceDraft
from vllm_saguaro.placement.channel import Traced
from vllm_saguaro.trace import Trace, WrittenTrace
from vllm_saguaro.trace_file import TraceFile
from vllm_saguaro.vllm_hooks import compatibility, coupled_sampler, device_ranks, marked_sampler, runner_v2
from vllm_saguaro.vllm_hooks.device_counters import DeviceCounters
from vllm_saguaro.vllm_hooks.device_drafts import open_device_draft
from vllm_saguaro.vllm_hooks.engine_args import OPTIONS_ATTRIBUTE
from vllm_saguaro.vllm_hooks.metrics import attach_page
from vllm_saguaro.vllm_hooks.runner_v2 import SaguaroSpeculator

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object

logger = init_logger(f"vllm.{__name__}")


class DeviceDraftWorker(_Worker):
    """To be inherited before vLLM's worker class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = kwargs.get("vllm_config") or args[0]
        compatibility.check_seams(compatibility.DEVICE_WORKER)
        if not vllm_config.use_v2_model_runner:
            raise SaguaroConfigError(
                'method "saguaro" runs on model runner V2 here, and vLLM has chosen V1 for this configuration: set the '
                "environment variable VLLM_USE_V2_MODEL_RUNNER=1, and vLLM will say what stands in the way"
            )
        self._options: dict[str, Any] = getattr(vllm_config.speculative_config, OPTIONS_ATTRIBUTE)
        self._speculator: SaguaroSpeculator | None = None
        self._trace: Trace | None = None
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Make the runner, and put our speculator where its own was."""
        super().init_device()
        self._options = _with_method(self._options, self.vllm_config.model_config, self.device)
        runner, config, group = self.model_runner, SaguaroConfig.from_dict(self._options), get_tp_group()
        self._leads = group.is_first_rank
        counting = None
        if self._leads:
            self._page = attach_page(self._options.get("counters"))
            counting = DeviceCounters(self._page, runner.device)
            if config.trace is not None:
                self._trace = WrittenTrace(TraceFile(config.trace), 1, self._page, logger)
        self._speculator = SaguaroSpeculator(
            runner.req_states,
            config.num_speculative_tokens,
            longest=config.draft_max_length,
            # What the other ranks sample is replaced by what the first one samples: they need no q.
            with_q=config.draft_sample_method == "probabilistic" and self._leads,
            counters=counting,
        )
        runner_v2.install(runner, self._speculator)
        device_ranks.install(runner, self._speculator, group)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the target, then the draft, and mark filler in the target's rejection sampler."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        assert self._speculator is not None
        coupled = self._options["draft_sample_method"] == "coupled"
        marked_sampler.install(self.model_runner, self._speculator.ready, coupled)
        if coupled:
            self._speculator.know_noise(self.model_runner.sampler.sampling_states.seeds.np)
        self._speculator.warm_up()
        if not self._leads:
            return
        draft = self._open_draft()
        logger.info("Saguaro: the draft holds %s GiB of the target's device.", format_gib(draft.resident_bytes))
        self._speculator.attach(draft)
        if self._trace is not None and isinstance(draft, Traced):
            self._trace.watch(0, draft)
        if self._options["placement"] == "stream":  # a process counts its lives itself
            self._page.set(counters.DRAFT_UP, 1)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the target's KV cache; captures from here on are for good."""
        super().initialize_from_config(kv_cache_config)
        if self._speculator is not None:
            self._speculator.cache_is_there()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Tell the draft who left, run the target, and tell the draft who came, by the slots that the runner chose."""
        assert self._speculator is not None
        began = time.perf_counter()
        self._speculator.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._speculator.follow_step(scheduler_output)
        if self._trace is not None:
            if scheduled := scheduler_output.num_scheduled_tokens:  # a step may be there to say who has left, alone
                drafts = scheduler_output.scheduled_spec_decode_tokens.values()
                self._trace.enqueued(began, len(scheduled), sum(map(bool, drafts)))
            self._trace.counted()
        return output

    def shutdown(self) -> None:
        """End the draft with the worker."""
        speculator, self._speculator = self._speculator, None
        try:
            if speculator is not None:
                if self._trace is not None:
                    self._trace.close()
                speculator.close()
                if self._leads and self._page.value(counters.HITS):
                    logger.info("Saguaro: hit rate %.3f.", self._page.hit_rate)
        finally:
            super().shutdown()

    def _open_draft(self) -> DeviceDraft:
        slots, longest = self.model_runner.max_num_reqs, self.model_config.max_model_len
        return open_device_draft(self._options, slots, longest, self.device, self._page)


def _with_method(options: dict[str, Any], model_config: Any, device: torch.device) -> dict[str, Any]:
    """The options with a way to draw that this vLLM has: its noise may be another than the one that we know."""
    if options["draft_sample_method"] != "coupled" or coupled_sampler.noise_is_known(model_config, device):
        return options
    logger.warning(
        'Saguaro: this vLLM draws with noise that is not known beforehand; draft_sample_method is "probabilistic".'
    )
    return options | {"draft_sample_method": "probabilistic"}
