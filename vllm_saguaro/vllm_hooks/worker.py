"""The worker door: `parallel_config.worker_cls` names this class (vLLM 0.32 and 0.33, `v1/worker/cpu_worker.py`).

The worker is the one object that sees everything in the right order: it makes the runner (`init_device`), loads the
target (`load_model`), is told of each step before the forward (`execute_model`), and is shut down. Of the ranks of a
tensor-parallel target the first has a draft side; the others emit what it samples (`ranks.py`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_saguaro import cores, counters
from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.process import ProcessChannel
from vllm_saguaro.placement.ray_channel import RayChannel
from vllm_saguaro.placement.restarting import RestartingChannel
from vllm_saguaro.placement.sharded import ShardedChannel
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.trace import Trace, WrittenTrace
from vllm_saguaro.trace_file import TraceFile
from vllm_saguaro.vllm_hooks import compatibility, cpu_sampler, ranks, rejection_sampler, runner_v1
from vllm_saguaro.vllm_hooks.draft_options import KV_BYTES, draft_options, mailbox_shape
from vllm_saguaro.vllm_hooks.draft_process import load_engine
from vllm_saguaro.vllm_hooks.engine_args import OPTIONS_ATTRIBUTE
from vllm_saguaro.vllm_hooks.known_noise import KnownNoise, RequestKeys
from vllm_saguaro.vllm_hooks.metrics import attach_page
from vllm_saguaro.vllm_hooks.ray_draft import MODULE, ray_draft
from vllm_saguaro.vllm_hooks.runner_v1 import SaguaroDrafter, SilentDrafter

logger = init_logger(f"vllm.{__name__}")

SLOTS_A_RUNNING_REQUEST = 2
"""Preempted requests keep their slot while others run."""


class SaguaroWorker(CPUWorker):
    """vLLM's CPU worker with a draft side beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = kwargs.get("vllm_config") or args[0]
        compatibility.check_seams(compatibility.WORKER)
        self._options: dict[str, Any] = getattr(vllm_config.speculative_config, OPTIONS_ATTRIBUTE)
        self._former: tuple[tuple[int, ...], int] | None = None
        self._channel: Channel | None = None
        self._trace = Trace()
        self._drafter = SilentDrafter()
        plan = self._options["cores"]
        with self._all_or_nothing():
            if plan and plan["bind_target"]:
                self._former = cores.allowed_cpus(), torch.get_num_threads()
                local_rank = kwargs["local_rank"] if "local_rank" in kwargs else args[1]
                own = plan["ranks"][local_rank] if plan["ranks"] else plan["target"]
                _bind(own, len(own))
            super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Make the runner, start the draft side, and put it where the runner's own drafter was."""
        with self._all_or_nothing():
            super().init_device()
            runner, group = self.model_runner, get_tp_group()
            keys = None
            if group.is_first_rank:
                keys = RequestKeys(
                    self.model_config.seed or 0,
                    known=KnownNoise.possible(runner.sampler.topk_topp_sampler),
                    keyed=self._options["draft_sample_method"] == "coupled",
                )
                self._drafter = self._make_drafter(keys)
            runner_v1.install(runner, self._drafter)
            cpu_sampler.mend(runner)
            rejection_sampler.install(runner, self._drafter.proposals, keys)
            ranks.install(runner, group)

    def _make_drafter(self, keys: RequestKeys) -> SaguaroDrafter:
        """Start the draft side."""
        config = SaguaroConfig.from_dict(self._options)
        slots = SLOTS_A_RUNNING_REQUEST * self.scheduler_config.max_num_seqs
        shape = mailbox_shape(config, self._options, slots, self.model_config.max_model_len)
        self._page = attach_page(self._options.get("counters"))
        drafts = min(config.draft_replicas, shape.slots)
        if config.trace is not None:
            self._trace = WrittenTrace(TraceFile(config.trace), drafts, self._page, logger)
        self._channel = self._open_channel(config, shape)
        steps = config.num_speculative_tokens
        priors = Priors.from_dict(config.priors) if config.priors is not None else None
        policy = Policy(steps, config.backup, config.chooses_itself, priors, config.most_branches)
        speculator = Speculator(self._channel, steps, self._page, logger, policy, self._trace)
        guesses, has_q = config.backup in ("auto", "ngram"), config.draft_sample_method != "greedy"
        return SaguaroDrafter(speculator, self.model_runner, keys, guesses, has_q)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the target while the draft loads elsewhere."""
        with self._all_or_nothing():
            super().load_model(load_dummy_weights=load_dummy_weights)

    def determine_available_memory(self) -> int:
        """Leave what the draft process has, and its KV budget, out of what the target's KV cache may take.

        vLLM gives each rank the share of a whole memory node, and then takes the fewest blocks of all ranks.
        """
        with self._all_or_nothing():
            if self.cache_config.kv_cache_memory_bytes is None:
                plan = self._options["cores"]
                self.requested_cpu_memory //= plan["ranks_a_node"] if plan else 1
                resident = self._channel.resident_bytes if self._channel is not None else 0
                # A draft in an actor that takes no memory here is on another node.
                if self._channel is not None and (resident or self._options["placement"] != "ray"):
                    taken = KV_BYTES["cpu"] * self._drafts + resident
                    # Of a pool its share: the other engines on its node, whichever of them started it, take theirs.
                    self.requested_cpu_memory -= taken // (self._drafts if self._options["draft_pool"] else 1)
            return super().determine_available_memory()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Tell the draft side who came and who left, then run the target."""
        self._drafter.begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        """End the draft side with the worker."""
        if self._channel is not None:
            self._report()
        self._undo()
        super().shutdown()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A part of the start that, when it fails, leaves neither a draft process nor a bound thread behind."""
        try:
            yield
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        self._trace.close()
        if self._channel is not None:
            self._drafter.wait_until_given_up()
            self._channel.close()
            self._channel = None
        if self._former is not None:
            _bind(*self._former)
            self._former = None

    def _open_channel(self, config: SaguaroConfig, shape: MailboxShape) -> Channel:
        plan = self._options["cores"]
        if config.placement == "inline":
            logger.warning("Drafting inline, in the target's own thread: for debugging and ablation, not for speed.")
            self._page.set(counters.DRAFT_UP, 1)
            drafted = self._trace.drafted_inline if config.trace is not None else None
            options = draft_options(config, self._options, shape.slots, ())
            inline = InlineChannel(lambda: load_engine(options), shape, drafted, self._inline_gave_up)
            self._trace.draft_up(0, True)
            self._trace.watch(0, inline)
            return inline
        drafts = min(config.draft_replicas, shape.slots)
        parts = cores.shared_out(plan["draft"], drafts) if plan else [()] * drafts
        if drafts > 1 and plan and len(plan["draft"]) < drafts:
            logger.warning("Saguaro: %d drafts share %d cores.", drafts, len(plan["draft"]))
        with contextlib.ExitStack() as undo:  # one that cannot be opened leaves none of the others
            channels = []
            for number, cpus in enumerate(parts):
                channels.append(self._open_draft(config, cpus, shape, number))
                undo.callback(channels[-1].close)
            undo.pop_all()
        return channels[0] if drafts == 1 else ShardedChannel(channels, shape.slots, logger)

    def _inline_gave_up(self) -> None:
        self._page.set(counters.DRAFT_UP, 0)
        self._page.set(counters.DRAFT_LEFT_OFF, 1)
        self._trace.draft_up(0, False)

    def _open_draft(
        self, config: SaguaroConfig, cpus: Sequence[int], shape: MailboxShape, number: int
    ) -> RestartingChannel:
        plan, options = self._options["cores"], draft_options(config, self._options, shape.slots, cpus)
        environment = cores.draft_environment(dict(os.environ), cpus or [0])

        lives = itertools.count()

        def start() -> Channel:
            again = next(lives) > 0
            with cores.born_on(cpus):
                if config.placement == "ray":
                    own = {**plan, "draft": list(cpus)}
                    draft = ray_draft(config, options, own, os.environ, shape.slots, again, number)
                    return RayChannel(draft, shape, environment)
                return ProcessChannel(MODULE, options, shape, environment)

        told = functools.partial(self._trace.draft_up, number)
        channel = RestartingChannel(start, config.draft_restarts, self._page, logger, told=told)
        self._trace.watch(number, channel)
        return channel

    @property
    def _drafts(self) -> int:
        """Times that the KV budget is there: once a replica; and a pool that this engine starts has room for many."""
        return int(self._options["draft_pool_engines" if self._options["draft_pool"] else "draft_replicas"])

    def _report(self) -> None:
        page = self._page
        if page.value(counters.HITS):
            logger.info(
                "Saguaro: hit rate %.3f, draft round %.2f ms, verify pass %.2f ms, the target waited %.0f us a step.",
                page.hit_rate,
                1e3 * page.mean(counters.DRAFT_ROUND),
                1e3 * page.mean(counters.VERIFY),
                1e6 * page.mean(counters.TARGET_WAIT),
            )


def _bind(cpus: Sequence[int], threads: int) -> None:
    """Keep this thread and the compute threads that it starts on these cores."""
    cores.pin(cpus)
    # The CPU worker replaces `torch.set_num_threads` by a no-op for the whole process; this is the function itself.
    torch._C.set_num_threads(threads)
