"""The target side for many independent requests at once: their logits, and the plugin's rejection sampler on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MinPLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tests.exactness.models import PROMPT, VOCABULARY, Settings, contexts, target_logits
from tests.exactness.speculation import K, Kind, Speculation
from vllm_saguaro.messages import Noise, Proposals
from vllm_saguaro.vllm_hooks import cpu_sampler
from vllm_saguaro.vllm_hooks.known_noise import KnownNoise
from vllm_saguaro.vllm_hooks.rejection_sampler import DenseProbabilities, SaguaroRejectionSampler

CPU = torch.device("cpu")


def use_the_workers_kernels() -> None:
    """What vLLM's CPU worker puts in the place of Triton kernels, and what `cpu_sampler.mend` puts on top of it."""
    current_platform.register_triton_kernel_overrides()
    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": cpu_sampler.expand})


class TargetSide:
    """Verifies the drafts of all rows in one step."""

    def __init__(self, kind: Kind, settings: Settings, names: list[int], integers: Tensor | None) -> None:
        """`names`: the seed or key of every request; `integers` [requests, 12]: the noise of those with a key."""
        self.kind, self.settings = kind, settings
        sampler = Sampler()
        draw = sampler.topk_topp_sampler
        assert KnownNoise.possible(draw)
        noise = draw.forward = KnownNoise(draw)
        keyed = kind.noise is Noise.KEY and integers is not None
        self._sampler = SaguaroRejectionSampler(
            sampler, None, CPU, list, lambda request_id, count: None, noise, self._known if keyed else None
        )
        self._integers: list[list[int]] = integers.tolist() if integers is not None else []
        self._generators = []
        if kind.noise is Noise.SEED:
            self._generators = [torch.Generator().manual_seed(seed) for seed in names]
        self._dense = DenseProbabilities(CPU)
        self._ids: list[int] = []
        self._indices: list[int] = []

    def verify(
        self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation, restarted: Tensor | None = None
    ) -> Tensor:
        """The tokens [R, K + 1] that come out, -1 where there are no more.

        ids [R]: which requests; text [R, L] of `length` [R] tokens; `under`: their drafts; `restarted` [R]: those that
        have been put off and taken up again.
        """
        self._ids, self._indices = ids.tolist(), self.noise_index(length, restarted).tolist()
        pairs = contexts(text, length, under.tokens)
        logits = target_logits()[pairs[..., 0], pairs[..., 1]]
        fed = torch.arange(K + 1) <= under.count[:, None]
        metadata = self._metadata(text, length, under)
        if not under.count.any():
            with self._sampler.without_drafts(metadata, len(ids)):
                tokens = self._sampler.sampler(logits=logits[:, 0].clone(), sampling_metadata=metadata)
        else:
            q = self.told_q(under)
            tokens = self._sampler(_spec_metadata(under), q, logits[fed].clone(), metadata)
        found = tokens.sampled_token_ids.long()
        return torch.nn.functional.pad(found, (0, K + 1 - found.shape[1]), value=-1)

    def noise_index(self, length: Tensor, restarted: Tensor | None) -> Tensor:
        """The number [R] of the noise of the next token: `rejection_sampler.install` counts in the same way."""
        return length - len(PROMPT)

    def told_q(self, under: Speculation) -> Tensor | None:
        """The q [T, V] of all drafts as the sampler makes it of the proposals, None where all are certain."""
        if not under.told.any():
            return None
        real = torch.arange(K) < under.count[:, None]
        positions = torch.arange(int(real.sum()))[under.told[:, None].expand(-1, K)[real]]
        told = real & under.told[:, None]
        proposals = Proposals(under.q_tokens[told].int().numpy(), under.q[told].numpy())
        return self._dense.fill(under.tokens[real].numpy(), VOCABULARY, positions.numpy(), proposals)

    def _known(self, row: int, count: int) -> list[int]:
        first = self._indices[row]
        return self._integers[self._ids[row]][first : first + count]

    def _metadata(self, text: Tensor, length: Tensor, under: Speculation) -> SamplingMetadata:
        rows, ends, counts = len(text), length.tolist(), under.count.tolist()
        own = torch.tensor(self._ids) % len(self.settings)

        def each(name: str) -> Tensor:
            return torch.tensor([float(getattr(setting, name)) for setting in self.settings])[own]

        temperature, top_p, top_k = each("temperature"), each("top_p"), each("top_k").int()
        presence, frequency, repetition = (each(f"{name}_penalty") for name in ("presence", "frequency", "repetition"))
        plain = not (presence.any() or frequency.any() or (repetition != 1).any())
        outputs = [[]] * rows if plain else [t[len(PROMPT) : end] for t, end in zip(text.tolist(), ends, strict=True)]
        drafts = [[]] * rows if plain else [d[:n] for d, n in zip(under.tokens.tolist(), counts, strict=True)]
        processors: list[MinPLogitsProcessor] = []
        if any(setting.min_p for setting in self.settings):
            config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
            processors.append(MinPLogitsProcessor(config, CPU, False))
            params = [SamplingParams(min_p=setting.min_p) for setting in self.settings]
            added: Any = [(row, params[number], None, []) for row, number in enumerate(own.tolist())]
            processors[0].update_state(BatchUpdate(batch_size=rows, removed=[], moved=[], added=added))
        return SamplingMetadata(
            temperature=temperature,
            all_greedy=False,
            all_random=bool((temperature > 0).all()),
            top_p=top_p if (top_p < 1).any() else None,
            top_k=torch.where(top_k > 0, top_k, VOCABULARY) if (top_k > 0).any() else None,
            generators={row: self._generators[i] for row, i in enumerate(self._ids)} if self._generators else {},
            max_num_logprobs=None,
            no_penalties=plain,
            prompt_token_ids=None if plain else torch.tensor(PROMPT).repeat(rows, 1),
            frequency_penalties=frequency,
            presence_penalties=presence,
            repetition_penalties=repetition,
            output_token_ids=outputs,
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(processors),
            spec_token_ids=drafts,
        )


def _spec_metadata(under: Speculation) -> SpecDecodeMetadata:
    count = under.count.numpy()
    bonus = np.cumsum(count + 1) - 1
    total = int(bonus[-1]) + 1
    return SpecDecodeMetadata(
        draft_token_ids=under.tokens[torch.arange(K) < under.count[:, None]].int(),
        num_draft_tokens=count.tolist(),
        cu_num_draft_tokens=torch.from_numpy(np.cumsum(count)).int(),
        cu_num_sampled_tokens=torch.from_numpy(np.cumsum(count + 1)).int(),
        target_logits_indices=torch.from_numpy(np.delete(np.arange(total), bonus)).int(),
        bonus_logits_indices=torch.from_numpy(bonus).int(),
        logits_indices=torch.arange(total, dtype=torch.int32),
    )
