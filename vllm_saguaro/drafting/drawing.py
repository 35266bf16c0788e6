"""Which token a branch drafts next: the likeliest, one drawn from q, or the one that the request's own noise picks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_saguaro.algorithm import noise as noise_of_integers
from vllm_saguaro.algorithm import position_noise
from vllm_saguaro.algorithm.sampling import Candidates, SamplingRows, candidates, deflate, draw, within_cuts
from vllm_saguaro.drafting.model import DraftModel
from vllm_saguaro.drafting.trunk import Deflation, Drawing, DrawRule, Trunk
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.messages import Sampling

METHODS = ("coupled", "probabilistic", "greedy")


class Drawer:
    """Draws drafts, with random numbers of its own: the verifier's are never seen here, but for noise that is known."""

    def __init__(self, method: str, model: DraftModel, seed: int | None = None) -> None:
        """`method`: for requests whose noise is not known, "greedy" takes the likeliest token at every temperature, the
        others draw from q.

        `seed` of the draft's own generator; None: one from the system. Raises ValueError for an unknown method.
        """
        if method not in METHODS:
            raise ValueError(f"the method {method!r} is none of {', '.join(METHODS)}")
        self._greedy = method == "greedy"
        self._model = model
        self._add_noise = operations_for(model.device).add_noise
        self._generator = torch.Generator(device=model.device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def kind(self, sampling: Sampling) -> Drawing:
        """How the drafts of such a request are drawn. Only those that are `SAMPLED` have a q to tell the verifier."""
        if sampling.coupled:
            return Drawing.COUPLED
        return Drawing.CERTAIN if sampling.greedy or self._greedy else Drawing.SAMPLED

    def rule(self, rows: Sequence[tuple[Trunk, int]], steps: int, deflation: Deflation) -> DrawRule:
        """The rule of a tree whose rows are (trunk, position of the bonus token), `steps` deep."""
        device, samplings = self._model.device, [trunk.sampling for trunk, _ in rows]
        kinds = [self.kind(sampling) for sampling in samplings]
        occur = frozenset(kinds)
        noise = None
        if Drawing.COUPLED in occur:
            seeds = [trunk.noise_seeds(position + 1, steps) for trunk, position in rows]
            noise = torch.tensor(seeds, dtype=torch.int64, device=device)
        drawn = Drawing.SAMPLED in occur or any(s.cut for s in samplings if s.coupled)
        fan_out = (list(deflation.fan_out) + [0] * steps)[:steps]
        c = [deflation.c if kind is Drawing.SAMPLED else 1.0 for kind in kinds]
        return DrawRule(
            kinds=occur,
            kind=torch.tensor(kinds, device=device),
            temperature=torch.tensor([1.0 if s.greedy else s.temperature for s in samplings], device=device),
            noise=noise,
            rows=SamplingRows.of(samplings, device) if drawn else None,
            fan_out=torch.tensor([fan_out] * len(rows), dtype=torch.int64, device=device),
            c=torch.tensor(c, dtype=torch.float32, device=device),
            deflation=deflation,
            positional=any(s.positional for s in samplings),
        )

    def draw(self, logits: torch.Tensor, rule: DrawRule, depth: int) -> tuple[np.ndarray, Candidates | None]:
        """The next token of each row [R] int64, on the host, from its logits [R, V].

        And q', what the sampled rows were drawn from (None where no row was).
        """
        found = q = None
        token = logits.argmax(-1) if Drawing.CERTAIN in rule.kinds else None
        if rule.rows is not None:
            found = candidates(logits, rule.rows)
        if Drawing.COUPLED in rule.kinds:
            picked = self._coupled(logits, rule, depth, found)
            token = picked if token is None else torch.where(rule.kind == Drawing.COUPLED, picked, token)
        if Drawing.SAMPLED in rule.kinds:
            assert found is not None
            q = Candidates(found.tokens, deflate(found.q, rule.fan_out[:, depth], rule.c))
            drawn = q.tokens.gather(1, draw(q.q, self._generator).unsqueeze(1)).squeeze(1)
            token = drawn if token is None else torch.where(rule.kind == Drawing.SAMPLED, drawn, token)
        assert token is not None
        return token.cpu().numpy(), q

    def _coupled(self, logits: torch.Tensor, rule: DrawRule, depth: int, found: Candidates | None) -> torch.Tensor:
        """argmax_t log q_t + g_t over all tokens, or over those that a request's own cuts leave."""
        assert rule.noise is not None
        seeds = rule.noise[:, depth]
        if rule.positional:
            raced = logits.clone()
            self._add_noise(raced, rule.temperature, seeds, rule.kind == Drawing.COUPLED)
            picked = raced.argmax(-1)
        else:
            picked = self._model.race(logits / rule.temperature.unsqueeze(1), seeds)
        if found is None:
            return picked
        gumbel = position_noise.gumbel if rule.positional else noise_of_integers.gumbel
        return within_cuts(picked, found, gumbel(seeds, found.tokens))
