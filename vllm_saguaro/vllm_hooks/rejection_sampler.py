"""vLLM's rejection sampler with three additions (vLLM 0.32, `v1/sample/rejection_sampler.py`, on the CPU).

vLLM's own rule decides on every draft: accept x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0).
What is added is what that rule is given:

1. The q that the drafts were drawn from, where the draft side tells it; a draft without is certain (one-hot q).
2. Noise that is known beforehand. In the ordinary sampler one integer decides a token (`known_noise.py`). Where the
   integers are known, so is the target's token at each draft position before the rule is asked: p is made one-hot at
   it, and what comes out is what the ordinary sampler gives, token by token, whatever was drafted. Seeded requests have
   their integers from their generator, which is left after as many draws as tokens came out: they get the text that
   they get without speculation. Others have them from a key that the draft side knows as well. Where that is so of all
   rows with drafts that sample, nothing is left to vLLM's rule, and it is told that the step is greedy: it then has
   no softmax over the vocabulary, and no noise for tokens that are never drawn.
3. `min_p` and `logit_bias` at the draft positions, where vLLM applies neither, in the ordinary sampler's order.

Two faults are mended on the way: `min_tokens` at the bonus position (`BonusMinTokens`), and the generator of a seeded
request whose prompt comes in pieces (`_without_discarded`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import GREEDY_TEMPERATURE, PLACEHOLDER_TOKEN_ID, RejectionSampler

from vllm_saguaro.messages import Proposals
from vllm_saguaro.vllm_hooks.dense_probabilities import DenseProbabilities
from vllm_saguaro.vllm_hooks.known_noise import KnownNoise, RequestKeys
from vllm_saguaro.vllm_hooks.min_tokens import BonusMinTokens, counting_drafts

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

ProposalsOf = Callable[[str, int], Proposals | None]
"""(request id, count) -> the q that its first `count` drafts were drawn from; None: they are certain. No id is twice in
a row with a probability above 0, and M is the same for all requests."""
IntegersOf = Callable[[int, int], list[int]]
"""(row, count) -> the integers of the row's next `count` tokens, where they come from a key; else none."""


class SaguaroRejectionSampler(RejectionSampler):
    """`RejectionSampler` with true q, with seeds as without speculation, and with `min_p` and `logit_bias`."""

    def __init__(
        self,
        sampler: Any,
        speculative_config: Any,
        device: torch.device,
        request_ids: Callable[[], Sequence[str]],
        proposals: ProposalsOf,
        noise: KnownNoise | None = None,
        integers: IntegersOf | None = None,
    ) -> None:
        """`noise` None: there a token is not decided by one integer (noise in double precision, other processors).

        Seeded rows are then left to vLLM's own rule: the right distribution, but not the same text as without
        speculation. `integers` None: no request has a key.
        """
        super().__init__(sampler, speculative_config, device)
        self._request_ids = request_ids
        self._proposals = proposals
        self._dense = DenseProbabilities(device)
        self._noise = noise
        self._integers = integers
        self._keyed: dict[int, list[int]] = {}
        """Rows of this step with a key, and the integers of their draft positions."""
        self._states: dict[int, torch.Tensor] = {}
        """Seeded rows of this step, and the state that their generator came with."""
        self._decides_all = False
        """Whether in this step the noise of all rows with drafts that sample is known; there may be no such row."""
        self._true_logits: tuple[torch.Tensor, torch.Tensor] | None = None
        """Positions [R] of the rows that were made one-hot, and what to report logprobs of [R, V]."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verify the drafts of one step: see `RejectionSampler.forward` for shapes. `draft_probs` given are kept."""
        counts, generators = metadata.num_draft_tokens, sampling_metadata.generators
        random = _random_rows(sampling_metadata, len(counts))
        drafted = [row for row in random if counts[row]]
        seeded = [row for row in drafted if row in generators] if self._noise is not None else []
        known = self._known_integers(sampling_metadata, random, counts)
        self._keyed = {row: integers[:-1] for row, integers in known.items() if len(integers) > 1}
        # Where the noise is known p is one-hot, and the outcome does not depend on q; certain drafts are safest.
        unknown = set(drafted).difference(seeded, known)
        self._decides_all = not unknown
        if draft_probs is None:
            draft_probs = self._draft_probabilities(metadata, logits.shape[-1], unknown)
        self._states = {row: generators[row].get_state() for row in seeded}
        self._true_logits = None
        for row in seeded:
            _draw(generators[row], counts[row])  # vLLM samples the bonus token first: it takes number n
        bonus = {row: integers[-1] for row, integers in known.items()}
        with (
            counting_drafts(sampling_metadata.logitsprocs, counts),
            self._noise.given(bonus) if self._noise is not None else contextlib.nullcontext(),
        ):
            # A copy: `apply_logits_processors` changes it for what comes after it.
            output = super().forward(metadata, draft_probs, logits, dataclasses.replace(sampling_metadata))
        for row, state in self._states.items():
            generators[row].set_state(state)
            _draw(generators[row], int((output.sampled_token_ids[row] != PLACEHOLDER_TOKEN_ID).sum()))
        return output

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, metadata: SpecDecodeMetadata
    ) -> torch.Tensor:
        """Everything between the model and the temperature, at the draft positions [T, V], in place.

        The ordinary sampler's order (`v1/sample/sampler.py`): allowed tokens, bad words, min tokens, bias, penalties;
        then temperature, min-p, top-k, top-p. Of these only the bias and the penalties do not commute (what forbids a
        token does so for good), so the bias comes before everything that vLLM does here.
        """
        ends = list(itertools.accumulate(metadata.num_draft_tokens, initial=0))
        spans = [slice(start, end) for start, end in itertools.pairwise(ends)]
        processors = sampling_metadata.logitsprocs
        for processor in processors.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                for row, biases in processor.biases.items():
                    tokens, values = torch.tensor(list(biases)), torch.tensor(list(biases.values()))
                    logits[spans[row], tokens.to(logits.device)] += values.to(logits.device)
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        for processor in processors.argmax_invariant:
            if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
                for row in _random_rows(sampling_metadata, len(spans)):
                    if min_p := processor.get_min_p_by_index(row):
                        _mask_min_p(logits[spans[row]], sampling_metadata.temperature[row], min_p)
        if self._states or self._keyed:
            self._decide(logits, sampling_metadata, spans)
        if self._decides_all:
            # The likeliest tokens of one-hot logits are the tokens that were drawn, and vLLM has drawn the bonus tokens
            # before it came here.
            sampling_metadata.all_greedy, sampling_metadata.all_random = True, False
        return logits

    def _get_logprobs_tensors(
        self,
        max_num_logprobs: int,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        target_logits: torch.Tensor,
        *rest: torch.Tensor,
    ) -> LogprobsTensors:
        """vLLM's own, with the true logits in the place of those that were made one-hot."""
        if self.is_processed_logprobs_mode and self._true_logits is not None:
            target_logits = target_logits.index_copy(0, *self._true_logits)
        return super()._get_logprobs_tensors(max_num_logprobs, metadata, logits, target_logits, *rest)

    def without_drafts(self, sampling_metadata: SamplingMetadata, rows: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the ordinary sampler takes the known noise of a step of so many rows that has no drafts."""
        if self._noise is None:
            return contextlib.nullcontext()
        known = self._known_integers(sampling_metadata, _random_rows(sampling_metadata, rows), [0] * rows)
        return self._noise.given({row: integers[0] for row, integers in known.items()})

    def _known_integers(
        self, sampling_metadata: SamplingMetadata, random: Sequence[int], counts: Sequence[int]
    ) -> dict[int, list[int]]:
        """The integers of the drafts and of the bonus token, for each of the rows `random` that has a key."""
        if self._noise is None or self._integers is None:
            return {}
        unseeded = [row for row in random if row not in sampling_metadata.generators]
        return {row: integers for row in unseeded if (integers := self._integers(row, counts[row] + 1))}

    def _decide(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, spans: list[slice]) -> None:
        """Draw the target's token at each draft position whose noise is known, and make `logits` one-hot at it.

        The ordinary sampler draws, on copies of the rows; position j of a seeded row takes integer j of its generator,
        because the sampler goes through its generators in the order of this dict. (One-hot logits are 0 and -inf:
        temperature, top-k and top-p leave them as they are.)
        """
        assert self._noise is not None
        generators = sampling_metadata.generators
        rows = [*self._states, *self._keyed]
        owners = [row for row in rows for _ in range(spans[row].start, spans[row].stop)]
        positions = [position for row in rows for position in range(spans[row].start, spans[row].stop)]
        owner, index = torch.tensor(owners, device=logits.device), torch.tensor(positions, device=logits.device)
        top_k, top_p = sampling_metadata.top_k, sampling_metadata.top_p
        for row, state in self._states.items():
            generators[row].set_state(state)
        seeded = sum(row in self._states for row in owners)
        keyed = dict(enumerate(itertools.chain.from_iterable(self._keyed.values()), start=seeded))
        with self._noise.given(keyed):
            tokens, processed = self.sampler.topk_topp_sampler(
                logits[index].div_(sampling_metadata.temperature[owner].unsqueeze(1)),
                {position: generators[row] for position, row in enumerate(owners[:seeded])},
                top_k[owner] if top_k is not None else None,
                top_p[owner] if top_p is not None else None,
            )
        if processed is not None:
            self._true_logits = index, processed
        logits.index_fill_(0, index, float("-inf"))
        logits[index, tokens] = 0.0

    def _draft_probabilities(
        self, metadata: SpecDecodeMetadata, vocab_size: int, rows: set[int]
    ) -> torch.Tensor | None:
        """The q of all drafts [T, V]; None if all are certain. `rows` are the rows whose q matters."""
        if not rows:
            return None
        positions, tokens, probabilities = [], [], []
        start = 0
        # In the runner's profiling there are more rows than requests.
        for row, (request_id, count) in enumerate(zip(self._request_ids(), metadata.num_draft_tokens, strict=False)):
            if row in rows and (q := self._proposals(request_id, count)) is not None:
                if len(q.tokens) != count or q.tokens.shape != q.probabilities.shape:
                    raise ValueError(f"vllm_saguaro: q of {q.tokens.shape} for {count} drafts")
                positions.append(np.arange(start, start + count))
                tokens.append(q.tokens)
                probabilities.append(q.probabilities)
            start += count
        if not positions:
            return None
        drafts = metadata.draft_token_ids.cpu().numpy().astype(np.int64)
        q = Proposals(np.concatenate(tokens), np.concatenate(probabilities))
        return self._dense.fill(drafts, vocab_size, np.concatenate(positions), q)


def install(runner: GPUModelRunner, proposals: ProposalsOf, keys: RequestKeys | None = None) -> SaguaroRejectionSampler:
    """Put our sampler, and every built-in logits processor, into a runner that has been made and has run nothing yet.

    (`may_reinitialize_input_batch` hands the processors on to the next batch.) Raises `RuntimeError` where vLLM has
    a sampler or a processor that we do not know.
    """
    known = (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    if type(runner.rejection_sampler) is not RejectionSampler or tuple(BUILTIN_LOGITS_PROCESSORS) != known:
        raise RuntimeError(
            f"vllm_saguaro: does not know {type(runner.rejection_sampler)} with {BUILTIN_LOGITS_PROCESSORS}"
        )
    batch = runner.input_batch
    batch.logitsprocs = LogitsProcessors(
        kind(runner.vllm_config, runner.device, PIN_MEMORY) for kind in (BonusMinTokens, *known[1:])
    )
    batch.sampling_metadata = dataclasses.replace(batch.sampling_metadata, logitsprocs=batch.logitsprocs)

    def integers(row: int, count: int) -> list[int]:
        now = runner.input_batch
        if keys is None or row >= len(now.req_ids):  # in the runner's profiling there are more rows than requests
            return []
        index = int(now.num_tokens_no_spec[row] - now.num_prompt_tokens[row])
        return keys.integers(now.req_ids[row], index, count)

    draw = runner.sampler.topk_topp_sampler
    noise = None
    if KnownNoise.possible(draw):
        noise = draw.forward = KnownNoise(draw)
    sampler = SaguaroRejectionSampler(
        runner.sampler,
        runner.speculative_config,
        runner.device,
        lambda: runner.input_batch.req_ids,
        proposals,
        noise,
        integers if keys is not None else None,
    )
    runner.rejection_sampler = sampler
    runner._sample = functools.partial(_sample, runner, sampler, runner._sample)
    for name in ("_sample", "_bookkeeping_sync"):
        setattr(runner, name, functools.partial(_without_discarded, runner, getattr(runner, name)))
    return sampler


def _sample(
    runner: GPUModelRunner,
    sampler: SaguaroRejectionSampler,
    original: Callable[..., Any],
    logits: torch.Tensor | None,
    metadata: SpecDecodeMetadata | None,
) -> Any:
    """The runner's `_sample`, with the known noise also in steps without a draft."""
    if metadata is not None and any(metadata.num_draft_tokens):
        return original(logits, metadata)
    batch = runner.input_batch
    with sampler.without_drafts(batch.sampling_metadata, batch.num_reqs):
        return original(logits, metadata)


def _without_discarded(runner: GPUModelRunner, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of the runner with the generators of the rows hidden whose token will be thrown away.

    Those are rows in the middle of their prompt. vLLM samples them like others and then turns the generator back by an
    offset, which a generator on the CPU does not have: the engine ends with "CPU Generator does not use offset".
    """
    batch = runner.input_batch
    discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    hidden = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
    try:
        return original(*args, **kwargs)
    finally:
        batch.generators.update(hidden)


def _draw(generator: torch.Generator, count: int) -> None:
    """Take integers from a generator as `TopKTopPSampler.forward_cpu` does, one a token."""
    for _ in range(count):
        torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


def _random_rows(sampling_metadata: SamplingMetadata, rows: int) -> list[int]:
    """Those of the first `rows` rows that do not take the likeliest token."""
    if sampling_metadata.all_greedy:
        return []
    greedy = (sampling_metadata.temperature == GREEDY_TEMPERATURE).tolist()
    return [row for row in range(rows) if not greedy[row]]


def _mask_min_p(logits: torch.Tensor, temperature: torch.Tensor, min_p: float) -> None:
    """Forbid the tokens below `min_p` times the likeliest one in `logits` [n, V], in place (`MinPLogitsProcessor`)."""
    probabilities = (logits / temperature).softmax(dim=-1)  # min-p acts on softmax(z / T)
    logits.masked_fill_(probabilities < probabilities.amax(dim=-1, keepdim=True) * min_p, float("-inf"))
