"""The verification against vLLM's own ordinary sampler, which is the reference for every token that comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample import rejection_sampler as vllms
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_saguaro.algorithm.noise import key_seed
from vllm_saguaro.messages import Proposals
from vllm_saguaro.vllm_hooks import cpu_sampler
from vllm_saguaro.vllm_hooks.dense_probabilities import DenseProbabilities
from vllm_saguaro.vllm_hooks.known_noise import KnownNoise, RequestKeys
from vllm_saguaro.vllm_hooks.min_tokens import BonusMinTokens
from vllm_saguaro.vllm_hooks.rejection_sampler import (
    IntegersOf,
    ProposalsOf,
    SaguaroRejectionSampler,
    install,
)

VOCABULARY = 24
STOP = 5
CPU = torch.device("cpu")
SAMPLES = 100_000


@pytest.fixture(autouse=True, scope="module")
def _kernels_of_the_worker(worker_kernels: None) -> None:
    """What vLLM's CPU worker puts in the place of Triton kernels, and what `cpu_sampler.mend` puts on top of it."""
    cpu_sampler.mend_kernel()


@dataclasses.dataclass
class Row:
    """One request in one step: what the target says at its positions [n + 1, V], and what was drafted there."""

    logits: torch.Tensor
    drafts: list[int]
    params: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(temperature=0.0))
    prompt: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    text: list[int] = dataclasses.field(default_factory=list)
    generator: torch.Generator | None = None
    q: Proposals | None = None


# ---- building a step ------------------------------------------------------------------------------------------------


def sampling(rows: Sequence[Row], texts: list[list[int]], drafts: list[list[int]] | None) -> SamplingMetadata:
    """What the runner's input batch makes of these requests."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(rows)))
    processors = [kind(config, CPU, False) for kind in (BonusMinTokens, LogitBiasLogitsProcessor, MinPLogitsProcessor)]
    added = [(index, row.params, row.prompt, texts[index]) for index, row in enumerate(rows)]
    for processor in processors:
        processor.update_state(BatchUpdate(batch_size=len(rows), removed=[], moved=[], added=added))
    params = [row.params for row in rows]
    vocabulary = rows[0].logits.shape[1]
    temperature = torch.tensor([p.temperature for p in params])
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params], dtype=torch.int32)
    top_p = torch.tensor([p.top_p for p in params])
    penalties = [
        torch.tensor([float(getattr(p, f"{name}_penalty")) for p in params])
        for name in ("frequency", "presence", "repetition")
    ]
    no_penalties = not (penalties[0].any() or penalties[1].any() or (penalties[2] != 1).any())
    longest = max(len(row.prompt) for row in rows)
    prompts = torch.tensor([row.prompt + [vocabulary] * (longest - len(row.prompt)) for row in rows])
    forbidden = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for index, p in enumerate(params):
        if p.allowed_token_ids:
            forbidden[index] = True
            forbidden[index, p.allowed_token_ids] = False
    logprobs = [p.logprobs for p in params if p.logprobs is not None]
    all_greedy = not temperature.any()
    return SamplingMetadata(
        temperature=None if all_greedy else temperature,
        all_greedy=all_greedy,
        all_random=bool((temperature > 0).all()),
        top_p=top_p if (top_p < 1).any() else None,
        top_k=top_k if (top_k < vocabulary).any() else None,
        generators={index: row.generator for index, row in enumerate(rows) if row.generator is not None},
        max_num_logprobs=max(logprobs) if logprobs else None,
        no_penalties=no_penalties,
        prompt_token_ids=None if no_penalties else prompts,
        frequency_penalties=penalties[0],
        presence_penalties=penalties[1],
        repetition_penalties=penalties[2],
        output_token_ids=texts,
        allowed_token_ids_mask=forbidden if forbidden.any() else None,
        bad_words_token_ids={i: p._bad_words_token_ids for i, p in enumerate(params) if p._bad_words_token_ids},
        logitsprocs=LogitsProcessors(processors),
        spec_token_ids=drafts,
    )


def verification(rows: Sequence[Row]) -> SpecDecodeMetadata:
    counts = np.array([len(row.drafts) for row in rows])
    bonus = np.cumsum(counts + 1) - 1
    total = int(counts.sum()) + len(rows)
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([token for row in rows for token in row.drafts], dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=torch.from_numpy(np.cumsum(counts)).int(),
        cu_num_sampled_tokens=torch.from_numpy(np.cumsum(counts + 1)).int(),
        target_logits_indices=torch.from_numpy(np.setdiff1d(np.arange(total), bonus)).int(),
        bonus_logits_indices=torch.from_numpy(bonus).int(),
        logits_indices=torch.arange(total, dtype=torch.int32),
    )


def make(
    proposals: ProposalsOf,
    request_ids: Sequence[str] = (),
    mode: Any = "raw_logprobs",
    integers: IntegersOf | None = None,
) -> SaguaroRejectionSampler:
    sampler = Sampler(mode)
    noise = sampler.topk_topp_sampler.forward = KnownNoise(sampler.topk_topp_sampler)
    return SaguaroRejectionSampler(sampler, None, CPU, lambda: request_ids, proposals, noise, integers)


def step(rows: Sequence[Row], sampler: RejectionSampler | None = None, mode: Any = "raw_logprobs") -> Any:
    """One verification of all rows together."""
    if sampler is None:
        sampler = make(lambda name, count: rows[int(name)].q, [str(index) for index in range(len(rows))], mode)
    metadata = sampling(rows, [list(row.text) for row in rows], [row.drafts for row in rows])
    return sampler(verification(rows), None, torch.cat([row.logits for row in rows]), metadata)


def tokens_of(output: Any) -> list[list[int]]:
    found, _ = RejectionSampler.parse_output(output.sampled_token_ids, 1 << 30)
    return found


def plain(row: Row, position: int, mode: Any = "raw_logprobs", generator: torch.Generator | None = None) -> Any:
    """What the ordinary sampler does with a row of its own, after its first `position` drafts."""
    alone = dataclasses.replace(row, text=row.text + row.drafts[:position], generator=generator)
    metadata = sampling([alone], [alone.text], None)
    return Sampler(mode)(logits=row.logits[position : position + 1].clone(), sampling_metadata=metadata)


def plain_tokens(row: Row, generator: torch.Generator | None = None) -> list[int]:
    """The tokens that the ordinary sampler emits one by one, as far as the drafts go along with it."""
    found: list[int] = []
    while len(found) <= len(row.drafts) and found == row.drafts[: len(found)]:
        found.append(int(plain(row, len(found), generator=generator).sampled_token_ids))
    return found


# ---- requests of all kinds ------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"logit_bias": {3: 4.0, 7: -6.0}},
    "bias and penalties": {"logit_bias": {1: 3.0, 2: -2.0}, "repetition_penalty": 1.7, "presence_penalty": 0.8},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.9},
    "min tokens": {"min_tokens": 4, "stop_token_ids": [STOP], "logit_bias": {STOP: 9.0}},
    "allowed": {"allowed_token_ids": list(range(2, 12)), "logit_bias": {3: 2.0, 20: 50.0}},
    "bad words": {"bad_words": ["x"], "logit_bias": {4: 3.0}},
    "min-p": {"min_p": 0.2},
    "min-p of 1": {"min_p": 1.0},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "min-p, top-k, top-p, bias": {"min_p": 0.05, "top_k": 9, "top_p": 0.9, "logit_bias": {8: 2.5}},
}
RANDOM_ONLY = ("min_p", "top_k", "top_p")


def params(name: str, **changes: Any) -> SamplingParams:
    asked = {**ASKED[name], **changes}
    words = asked.pop("bad_words", None)
    made = SamplingParams(**asked)
    if words:
        made._bad_words_token_ids = [[4], [1, 6]]
    return made


def random_row(rng: np.random.Generator, wanted: SamplingParams, count: int, follow: float = 0.6) -> Row:
    """A row with `count` drafts, of which a part is what the ordinary sampler would say."""
    seed = int(rng.integers(1 << 31)) if wanted.seed is None else wanted.seed
    logits = torch.from_numpy(rng.normal(0, 2, (count + 1, VOCABULARY))).float()
    text = rng.integers(0, VOCABULARY, int(rng.integers(0, 4))).tolist()
    row = Row(logits, [], wanted, rng.integers(0, VOCABULARY, 4).tolist(), text)
    foretold = torch.Generator().manual_seed(seed)
    for position in range(count):
        token = int(plain(row, position, generator=foretold).sampled_token_ids)
        row.drafts.append(token if rng.random() < follow else int(rng.integers(VOCABULARY)))
    if wanted.seed is not None:
        row.generator = torch.Generator().manual_seed(seed)
    return row


def some_q(rng: np.random.Generator, drafts: Sequence[int]) -> Proposals:
    """A q of 6 tokens that contains the drafts."""
    tokens = np.stack(
        [np.r_[draft, rng.choice(np.setdiff1d(np.arange(VOCABULARY), draft), 5, False)] for draft in drafts]
    )
    return Proposals(tokens.astype(np.int32), rng.dirichlet(np.ones(6), len(drafts)).astype(np.float32))


# ---- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["all greedy", "with a random row"])
@pytest.mark.parametrize("name", [name for name in ASKED if not set(ASKED[name]) & set(RANDOM_ONLY)])
def test_greedy_rows_get_the_ordinary_samplers_tokens(name: str, mixed: bool) -> None:
    rng = np.random.default_rng(1)
    lengths = set()
    for _ in range(25):
        rows = [random_row(rng, params(name, temperature=0.0), count, 0.8) for count in (0, 3, 1, 4)]
        expected = [plain_tokens(row) for row in rows]
        if mixed:
            rows.append(random_row(rng, SamplingParams(temperature=1.0, top_k=3), 2))
            rows[-1].q = some_q(rng, rows[-1].drafts)
        assert tokens_of(step(rows))[: len(expected)] == expected
        lengths |= {len(tokens) for tokens in expected}
    assert lengths == {1, 2, 3, 4, 5}


def test_the_bonus_position_counts_the_drafts_as_text_for_min_tokens() -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[:3, 8] = 5.0
    logits[3, STOP] = 5.0
    for least, expected in ((2, STOP), (3, STOP), (4, 0)):
        wanted = SamplingParams(temperature=0.0, min_tokens=least, stop_token_ids=[STOP])
        row = Row(logits, [8, 8, 8], wanted)
        rows = [
            row,
            dataclasses.replace(row, params=SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=[STOP])),
        ]
        assert plain_tokens(row) == [8, 8, 8, expected]
        assert tokens_of(step(rows)) == [[8, 8, 8, expected], [8, 8, 8, 0]]


def test_min_tokens_in_a_later_step_without_drafts_is_vllms() -> None:
    wanted = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=[0])
    rows = [Row(torch.zeros(1, VOCABULARY), []), Row(torch.zeros(2, VOCABULARY), [1], wanted)]
    metadata = sampling(rows, [[], []], [[], [1]])
    make(lambda name, count: None)(verification(rows), None, torch.cat([r.logits for r in rows]), metadata)
    (processor,) = [p for p in metadata.logitsprocs.all if isinstance(p, BonusMinTokens)]
    assert processor.apply(torch.zeros(2, VOCABULARY))[:, 0].tolist() == [0.0, -torch.inf]


# ---- what the rule is given -----------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """The (q, logits) that vLLM's rule is called with."""
    seen: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    original = vllms.rejection_sample

    def rejection_sample(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((None if args[4] is None else args[4].clone(), args[5].clone()))
        return original(*args, **kwargs)

    monkeypatch.setattr(vllms, "rejection_sample", rejection_sample)
    return seen


@pytest.mark.parametrize("name", ASKED)
def test_unseeded_rows_have_the_ordinary_samplers_logits_at_every_draft(name: str, given: list[Any]) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        names = [name, "nothing", name, "top-k", "min-p"]
        rows = [
            random_row(rng, params(n, temperature=0.7, logprobs=-1), c)
            for n, c in zip(names, (3, 2, 0, 1, 4), strict=True)
        ]
        rows.append(random_row(rng, SamplingParams(temperature=0.8, seed=4), 2))
        step([dataclasses.replace(row, params=_without_logprobs(row.params)) for row in rows])
        expected = [
            plain(row, j, "processed_logits").logprobs_tensors.logprobs
            for row in rows[:-1]
            for j in range(len(row.drafts))
        ]
        found = given[-1][1][: len(expected)]
        assert torch.equal(found.softmax(-1), torch.cat(expected).softmax(-1))


def _without_logprobs(wanted: SamplingParams) -> SamplingParams:
    changed = wanted.clone()
    changed.logprobs = None
    return changed


def test_q_is_dense_as_drawn_and_clean_after_ragged_steps(given: list[Any]) -> None:
    rng = np.random.default_rng(3)
    rows: list[Row] = []
    sampler = make(lambda name, count: rows[int(name)].q, [str(i) for i in range(9)])
    widths = set()
    for _ in range(40):
        rows[:] = []
        for _ in range(int(rng.integers(1, 9))):
            row = random_row(rng, SamplingParams(temperature=float(rng.integers(2))), int(rng.integers(0, 5)))
            if row.drafts and row.params.temperature and rng.random() < 0.7:
                row.q = some_q(rng, row.drafts)
            rows.append(row)
        if not any(row.drafts for row in rows):
            continue
        step(rows, sampler)
        found = given[-1][0]
        expected = torch.zeros(sum(len(row.drafts) for row in rows), VOCABULARY)
        start = 0
        for row in rows:
            for j, draft in enumerate(row.drafts):
                if row.q is None:
                    expected[start + j, draft] = 1.0
                else:
                    expected[start + j, row.q.tokens[j].astype(np.int64)] = torch.from_numpy(row.q.probabilities[j])
            start += len(row.drafts)
        if any(row.q is not None for row in rows):
            assert found is not None
            assert torch.equal(found, expected)
            widths.add(len(found))
        else:
            assert found is None
    assert len(widths) > 8


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    dense = DenseProbabilities(CPU)
    tokens, chances = (
        np.array([[1, 9, -1], [2, 0, 8]], np.int32),
        np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]], np.float32),
    )
    found = dense.fill(np.array([1, 7, 2]), 8, np.array([0, 2]), Proposals(tokens, chances))
    assert torch.equal(found.to_sparse().indices(), torch.tensor([[0, 1, 2, 2], [1, 7, 0, 2]]))
    assert found[0, 1] == 0.5
    assert not dense.fill(np.array([9]), 8, np.array([0]), Proposals(tokens[:1], chances[:1])).any()


def test_a_draft_that_its_q_does_not_contain_is_certain() -> None:
    q = Proposals(np.array([[1, 2], [1, 2]], np.int32), np.array([[1.0, 0.0], [0.5, 0.5]], np.float32))
    found = DenseProbabilities(CPU).fill(np.array([2, 3]), 8, np.array([0, 1]), q)
    assert torch.equal(found, torch.eye(8)[[2, 3]])


def test_q_is_asked_for_random_rows_without_a_seed_alone() -> None:
    asked = []

    def proposals(name: str, count: int) -> None:
        asked.append((name, count))

    rng = np.random.default_rng(4)
    wanted = [SamplingParams(temperature=t, seed=s) for t, s in ((1.0, None), (0.0, None), (1.0, 3), (0.5, None))]
    rows = [random_row(rng, p, c) for p, c in zip(wanted, (2, 2, 2, 0), strict=True)]
    step(rows, make(proposals, ["a", "b", "c", "d"]))
    step(rows[1:2], make(proposals, ["e"]))
    step(rows[:2], make(proposals, []))  # profiling: rows that are no requests
    assert asked == [("a", 2)]


def test_q_of_another_number_of_drafts_is_an_error() -> None:
    rng = np.random.default_rng(5)
    row = random_row(rng, SamplingParams(temperature=1.0), 3)
    row.q = some_q(rng, row.drafts[:2])
    with pytest.raises(ValueError, match="3 drafts"):
        step([row])


# ---- distributions --------------------------------------------------------------------------------------------------

Z = torch.tensor([[1.0, 0.2, -0.3, 2.0, 0.0, -1.0, 0.6, 1.4], [0.1, 1.1, 0.4, -2.0, 0.3, 0.9, 0.0, -0.5], [0.0] * 8])
Q = np.array([[0.25, 0.05, 0.0, 0.35, 0.1, 0.05, 0.05, 0.15], [0.1, 0.5, 0.2, 0.0, 0.0, 0.1, 0.1, 0.0]])


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """How likely counts at least so far from the expected ones are."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)))


def sample(
    told: np.ndarray | None, drawn: np.ndarray = Q, count: int = SAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [count, 3] (-1: none) of many equal rows whose two drafts are drawn from `drawn`, and these drafts.

    `told` is the q [2, 8] that the verification is told, None: it is told nothing.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    drafts = np.stack([rng.choice(8, count, p=q) for q in drawn], axis=1)
    names = ["r"] * count
    q = None if told is None else Proposals(np.tile(np.arange(8, dtype=np.int32), (2, 1)), told.astype(np.float32))
    one = sampling([Row(Z, [0, 0], SamplingParams(temperature=1.0))], [[]], None)
    metadata = dataclasses.replace(one, temperature=torch.ones(count))
    verified = SpecDecodeMetadata(
        draft_token_ids=torch.from_numpy(drafts).flatten().int(),
        num_draft_tokens=[2] * count,
        cu_num_draft_tokens=torch.arange(2, 2 * count + 1, 2, dtype=torch.int32),
        cu_num_sampled_tokens=torch.arange(3, 3 * count + 1, 3, dtype=torch.int32),
        target_logits_indices=torch.arange(3 * count).view(-1, 3)[:, :2].flatten().int(),
        bonus_logits_indices=torch.arange(2, 3 * count, 3, dtype=torch.int32),
        logits_indices=torch.arange(3 * count, dtype=torch.int32),
    )
    output = make(lambda name, count: q, names)(verified, None, Z.repeat(count, 1), metadata)
    return output.sampled_token_ids.numpy(), drafts


def worst_p(tokens: np.ndarray) -> float:
    """The smallest p value of the three positions, each against softmax of the target's logits there."""
    found = []
    for position, p in enumerate(Z.double().softmax(-1).numpy()):
        emitted = tokens[:, position][tokens[:, position] >= 0]
        found.append(chi_square_p(np.bincount(emitted, minlength=8), p * len(emitted)))
    return min(found)


@pytest.mark.parametrize("told", [Q, None], ids=["true q", "certain"])
def test_tokens_are_the_targets_own(told: np.ndarray | None) -> None:
    assert worst_p(sample(told)[0]) > 1e-4


@pytest.mark.parametrize("told", [Q, None], ids=["true q", "certain"])
def test_drafts_are_accepted_as_often_as_the_rule_says(told: np.ndarray | None) -> None:
    tokens, drafts = sample(told)
    p = Z.double().softmax(-1).numpy()[0]
    # With q as drawn: sum_x min(p, q); certain drafts: sum_x q(x) p(x).
    accepted = np.minimum(p, Q[0]).sum() if told is not None else (p * Q[0]).sum()
    # A rejected certain draft is never drawn again; one with a q may be only where p > q, and is then not rejected.
    found = (tokens[:, 0] == drafts[:, 0]).mean()
    assert abs(found - accepted) < 5 * np.sqrt(accepted * (1 - accepted) / SAMPLES)


def moved(part: float) -> np.ndarray:
    """Q with a part of its mass moved from token 3 to token 0, at both positions."""
    wrong = Q.copy()
    wrong[0, [3, 0]] += (-part, part)
    wrong[1, [1, 0]] += (-part, part)
    return wrong


@pytest.mark.parametrize("told", [moved(0.01), Q[:, ::-1], np.full((2, 8), 0.125)], ids=["1 %", "another", "uniform"])
def test_it_would_see_a_wrong_q(told: np.ndarray) -> None:
    assert worst_p(sample(told)[0]) < 1e-6


def test_it_would_see_drafts_that_are_always_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllms, "generate_uniform_probs", lambda n, *_: torch.zeros(n, dtype=torch.float64))
    assert worst_p(sample(Q)[0]) < 1e-6


# ---- seeds ----------------------------------------------------------------------------------------------------------


def seeded_rows(rng: np.random.Generator) -> list[Row]:
    rows = []
    for _ in range(int(rng.integers(1, 5))):
        name = str(rng.choice(list(ASKED)))
        kind = rng.random()
        if kind < 0.6:
            wanted = params(name, temperature=float(rng.uniform(0.3, 1.5)), seed=int(rng.integers(1 << 20)))
        elif kind < 0.8:
            wanted = params("top-p", temperature=0.9)
        else:
            wanted = params("bias", temperature=0.0)
        row = random_row(rng, wanted, int(rng.integers(0, 5)))
        if row.drafts and rng.random() < 0.7:
            row.q = some_q(rng, row.drafts)
        rows.append(row)
    return rows


def test_seeded_rows_get_the_ordinary_samplers_tokens_and_generator() -> None:
    rng = np.random.default_rng(6)
    lengths: dict[int, int] = {}
    for _ in range(250):
        rows = seeded_rows(rng)
        if not any(row.drafts for row in rows):
            continue
        alone = {i: torch.Generator().manual_seed(r.params.seed) for i, r in enumerate(rows) if r.generator is not None}
        expected = {i: plain_tokens(rows[i], alone[i]) for i in alone}
        found = tokens_of(step(rows))
        for i, tokens in expected.items():
            assert found[i] == tokens
            generator = rows[i].generator
            assert generator is not None
            assert torch.equal(generator.get_state(), alone[i].get_state())
            lengths[len(tokens)] = lengths.get(len(tokens), 0) + 1
    assert min(lengths[n] for n in (1, 2, 3, 4, 5)) >= 5


@pytest.mark.parametrize("probability", [1.0, 1e-9])
def test_a_seeded_row_does_not_depend_on_its_q(probability: float) -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        row = random_row(rng, SamplingParams(temperature=1.0, seed=int(rng.integers(1000))), 3)
        other = (np.array(row.drafts) + 1) % VOCABULARY
        q = np.array([probability, 1 - probability], np.float32)
        row.q = Proposals(np.stack([row.drafts, other], axis=1).astype(np.int32), np.tile(q, (3, 1)))
        expected = plain_tokens(row, torch.Generator().manual_seed(row.params.seed))
        assert tokens_of(step([row])) == [expected]


def test_a_whole_text_is_the_same_for_every_draft() -> None:
    """Many steps on: the generator goes on where it should."""
    rng = np.random.default_rng(8)
    table = torch.from_numpy(rng.normal(0, 2, (VOCABULARY, VOCABULARY))).float()  # logits after each last token

    def text(step_size: Callable[[], int]) -> list[int]:
        generator, found = torch.Generator().manual_seed(11), [0]
        while len(found) < 60:
            count = step_size()
            drafts: list[int] = []
            for _ in range(count):
                drafts.append(int(table[drafts[-1] if drafts else found[-1]].argmax()))
            contexts = [found[-1], *drafts]
            row = Row(table[contexts], drafts, SamplingParams(temperature=0.8, seed=11), generator=generator)
            if count:
                found += tokens_of(step([row, Row(table[:2], [3])]))[0]
            else:
                found.append(int(plain(row, 0, generator=generator).sampled_token_ids))
        return found[:60]

    assert text(lambda: 0) == text(lambda: 3) == text(lambda: int(rng.integers(0, 5)))


def test_unseeded_rows_keep_their_distribution_beside_a_seeded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    count = 4000
    logits = Z[[0, 1]]
    drafts = rng.choice(8, count, p=Q[0])
    q = Proposals(np.arange(8, dtype=np.int32)[None], Q[:1].astype(np.float32))
    wanted = SamplingParams(temperature=1.0)
    rows = [Row(logits, [int(draft)], wanted, q=q) for draft in drafts]
    rows[0] = Row(logits, [1], SamplingParams(temperature=1.0, seed=1), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = [tokens[0] for tokens in tokens_of(step(rows))[1:]]
    p = Z[0].double().softmax(-1).numpy()
    assert chi_square_p(np.bincount(first, minlength=8), p * len(first)) > 1e-4


def test_with_noise_that_takes_more_than_an_integer_seeds_are_left_to_vllm(given: list[Any]) -> None:
    row = random_row(np.random.default_rng(10), SamplingParams(temperature=1.0, seed=5), 3)
    sampler = SaguaroRejectionSampler(Sampler("raw_logprobs", True), None, CPU, lambda: ["a"], lambda name, count: None)
    tokens_of(step([row], sampler))
    assert torch.isfinite(given[0][1]).all()


# ---- keys -----------------------------------------------------------------------------------------------------------


def by_key(row: Row, integers: Sequence[int]) -> list[int]:
    """The tokens that the ordinary sampler emits with these integers, as far as the drafts go along with it."""
    sampler = Sampler()
    noise = sampler.topk_topp_sampler.forward = KnownNoise(sampler.topk_topp_sampler)
    found: list[int] = []
    while len(found) <= len(row.drafts) and found == row.drafts[: len(found)]:
        position = len(found)
        alone = dataclasses.replace(row, text=row.text + row.drafts[:position])
        with noise.given({0: integers[position]}):
            output = sampler(row.logits[position : position + 1].clone(), sampling([alone], [alone.text], None))
        found.append(int(output.sampled_token_ids))
    return found


def test_rows_with_a_key_get_the_tokens_of_their_key() -> None:
    rng = np.random.default_rng(13)
    lengths = set()
    for _ in range(120):
        rows = seeded_rows(rng)
        keyed = {
            i: [key_seed(i, j) for j in range(len(row.drafts) + 1)]
            for i, row in enumerate(rows)
            if row.generator is None and row.params.temperature
        }
        for i in keyed:  # drafts that the key says too, for a part
            rows[i].drafts = [int(t) if rng.random() < 0.8 else 0 for t in foretold(rows[i], keyed[i])]
            rows[i].q = some_q(rng, rows[i].drafts) if rows[i].drafts else None
        if not any(row.drafts for row in rows):
            continue
        alone = {i: torch.Generator().manual_seed(r.params.seed) for i, r in enumerate(rows) if r.generator is not None}
        expected = {i: by_key(rows[i], integers) for i, integers in keyed.items()}
        expected |= {i: plain_tokens(rows[i], generator) for i, generator in alone.items()}

        expected |= {i: plain_tokens(row) for i, row in enumerate(rows) if not row.params.temperature}

        def integers_of(row: int, count: int) -> list[int]:  # also where they must not be used
            return [key_seed(row, j) for j in range(count)]

        def q_of(name: str, count: int, rows: list[Row] = rows) -> Proposals | None:
            return rows[int(name)].q

        names = [str(i) for i in range(len(rows))]
        found = tokens_of(step(rows, make(q_of, names, integers=integers_of)))
        assert {i: found[i] for i in expected} == expected
        lengths |= {len(expected[i]) for i in keyed}
    assert lengths == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("drafts", "unknown"), [(3, 0), (0, 0), (3, 2), (0, 2)])
def test_where_all_noise_is_known_nothing_is_drawn_from_probabilities(
    drafts: int, unknown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where no row that samples has drafts. What vLLM was given of the step stays as it was."""
    drawn: list[int] = []
    recovered = vllms.sample_recovered_tokens

    def counting(*args: Any, **kwargs: Any) -> Any:
        drawn.append(1)
        return recovered(*args, **kwargs)

    monkeypatch.setattr(vllms, "sample_recovered_tokens", counting)
    rng = np.random.default_rng(5)
    asked = (
        (params("min-p, top-k, top-p, bias"), drafts),
        (SamplingParams(temperature=0.0), 2),
        (params("nothing"), 0),
        (params("top-k"), unknown),  # has no key
    )
    rows = [random_row(rng, wanted, count) for wanted, count in asked]
    keys = {0: [11, 12, 13, 14], 2: [21]}
    sampler = make(lambda *_: None, ["0", "1", "2", "3"], integers=lambda row, count: keys.get(row, [])[:count])
    metadata = sampling(rows, [row.text for row in rows], [row.drafts for row in rows])
    before = metadata.all_greedy, metadata.all_random
    found = tokens_of(sampler(verification(rows), None, torch.cat([row.logits for row in rows]), metadata))
    assert found[0] == by_key(rows[0], keys[0])
    assert found[1] == plain_tokens(rows[1])
    assert found[2] == by_key(rows[2], keys[2])
    assert bool(drawn) == bool(unknown)
    assert (metadata.all_greedy, metadata.all_random) == before


def foretold(row: Row, integers: Sequence[int]) -> list[int]:
    """Drafts that a row's key would accept, every one."""
    drafts: list[int] = []
    for _ in row.drafts:
        drafts = by_key(dataclasses.replace(row, drafts=drafts), integers)
    return drafts


# ---- logprobs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_logprobs_are_the_ordinary_samplers(mode: str) -> None:
    rng = np.random.default_rng(12)
    for _ in range(20):
        wanted = [
            params(n, temperature=0.8, logprobs=2, seed=int(rng.integers(99))) for n in ("top-k", "min-p", "bias")
        ]
        wanted.append(params("bias and penalties", temperature=0.0, logprobs=1))
        rows = [random_row(rng, p, c) for p, c in zip(wanted, (3, 4, 2, 3), strict=True)]
        output = step(rows, mode=mode)
        tokens, found = RejectionSampler.parse_output(output.sampled_token_ids, VOCABULARY, (), output.logprobs_tensors)
        assert found is not None
        expected: list[LogprobsTensors] = []
        for row, emitted in zip(rows, tokens, strict=True):
            generator = torch.Generator().manual_seed(row.params.seed) if row.params.seed is not None else None
            row.params.logprobs = 2  # as many as the batch reports
            expected += [plain(row, j, mode, generator).logprobs_tensors for j in range(len(emitted))]
        values = np.concatenate([e.logprobs.numpy() for e in expected])
        np.testing.assert_allclose(found.logprobs, values, atol=1e-5)
        assert found.sampled_token_ranks.tolist() == [int(e.selected_token_ranks) for e in expected]
        assert found.logprob_token_ids[:, 0].tolist() == [token for row_tokens in tokens for token in row_tokens]


def test_logprobs_of_a_step_have_nothing_of_the_step_before() -> None:
    rng = np.random.default_rng(15)
    sampler = make(lambda name, count: None, mode="processed_logprobs")
    step([random_row(rng, params("top-k", temperature=0.8, logprobs=2, seed=1), 3)], sampler)
    row = random_row(rng, params("nothing", temperature=0.0, logprobs=2), 3, follow=1.0)
    expected = [plain(row, j, "processed_logprobs").logprobs_tensors.logprobs for j in range(4)]
    torch.testing.assert_close(step([row], sampler).logprobs_tensors.logprobs, torch.cat(expected))


# ---- into the runner ------------------------------------------------------------------------------------------------


class FakeRunner:
    """As much of the runner as `install` touches."""

    def __init__(self) -> None:
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
        self.vllm_config, self.device, self.speculative_config = config, CPU, None
        self.sampler = Sampler()
        self.rejection_sampler: Any = RejectionSampler(self.sampler)
        only = LogitsProcessors([MinTokensLogitsProcessor(config, CPU, False)])
        metadata = sampling([Row(torch.zeros(1, VOCABULARY), [])], [[]], None)
        self.input_batch = SimpleNamespace(
            logitsprocs=only,
            sampling_metadata=dataclasses.replace(metadata, logitsprocs=only),
            req_ids=["a", "b"],
            num_reqs=2,
            num_tokens_no_spec=np.array([9, 7]),
            num_prompt_tokens=np.array([4, 7]),
            generators={i: torch.Generator().manual_seed(i) for i in range(2)},
        )
        self.discard_request_mask = SimpleNamespace(np=np.array([True, False, True, True]))
        self.seen: list[list[int]] = []

    def _sample(self, logits: torch.Tensor | None, metadata: SpecDecodeMetadata | None) -> Any:
        self.seen.append(list(self.input_batch.generators))
        assert logits is not None
        return self.sampler(logits, self.input_batch.sampling_metadata)

    def _bookkeeping_sync(self) -> str:
        self.seen.append(list(self.input_batch.generators))
        return "kept"


@pytest.fixture
def runner() -> Any:
    return FakeRunner()


def test_the_runner_gets_our_sampler_and_every_processor(runner: Any) -> None:
    sampler = install(runner, lambda name, count: None)
    assert runner.rejection_sampler is sampler
    kinds = [BonusMinTokens, LogitBiasLogitsProcessor, MinPLogitsProcessor]
    assert sorted(map(str, map(type, runner.input_batch.logitsprocs.all))) == sorted(map(str, kinds))
    assert runner.input_batch.sampling_metadata.logitsprocs is runner.input_batch.logitsprocs
    assert sampler._request_ids() == ["a", "b"]


def test_a_runner_that_we_do_not_know_is_refused(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(runner, lambda name, count: None)
    with pytest.raises(RuntimeError, match="does not know"):
        install(runner, lambda name, count: None)
    other: Any = FakeRunner()
    monkeypatch.setattr("vllm_saguaro.vllm_hooks.rejection_sampler.BUILTIN_LOGITS_PROCESSORS", [BonusMinTokens])
    with pytest.raises(RuntimeError, match="does not know"):
        install(other, lambda name, count: None)


def test_the_generator_of_a_row_in_the_middle_of_its_prompt_is_out_of_reach(runner: Any) -> None:
    install(runner, lambda name, count: None)
    before = dict(runner.input_batch.generators)
    runner._sample(torch.zeros(1, VOCABULARY), None)
    assert runner._bookkeeping_sync() == "kept"
    with pytest.raises(AssertionError):
        runner._sample(None, None)
    assert runner.seen == [[1], [1], [1]]
    assert runner.input_batch.generators == before


def test_a_step_without_drafts_takes_the_integers_of_its_keys(runner: Any) -> None:
    keys = RequestKeys(3, known=True, keyed=True)
    wanted = SamplingParams(temperature=1.0)
    for name in ("a", "b"):
        keys.noise_of(name, wanted)
    install(runner, lambda name, count: None, keys)
    runner.input_batch.generators = {}
    logits = torch.from_numpy(np.random.default_rng(14).normal(0, 1, (2, VOCABULARY))).float()
    rows = [Row(logits[i : i + 1], [], wanted) for i in range(2)]
    runner.input_batch.sampling_metadata = sampling(rows, [[], []], None)
    # Five tokens came out of request a before this one, none of b.
    integers = [keys.integers("a", 5, 1), keys.integers("b", 0, 1)]
    expected = [by_key(row, given) for row, given in zip(rows, integers, strict=True)]
    for metadata in (None, verification(rows)):
        assert runner._sample(logits.clone(), metadata).sampled_token_ids.tolist() == expected
    assert expected != [by_key(row, [1]) for row in rows]
