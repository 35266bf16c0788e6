"""What the engines of the V2 tests are asked to do. Plain vLLM gets the same, under the same options."""

from __future__ import annotations

from typing import Any

from tests.e2e import plans
from tests.e2e.harness import Json, prompts, text_of, tokenize

TOKENS = 24
SEEDED_TOKENS = 16
"""Fewer: eight requests through an interpreter, again and again."""
GREEDY = [tokenize(prompt) for prompt in prompts()[:4]]
SAMPLED_PROMPT = tokenize(plans.SAMPLED_PROMPT)
ALLOWED = [302, 304, 305, 306, 308, 309, 310, 311]
"""The small vocabulary of the sampled requests: which of them are likely changes from token to token."""
CANDIDATES = [302, 304, 305, 308, 309, 310, 311, 5]
"""Of a made-up q: one token is missing, and one is never allowed."""
SAMPLED: Json = {"temperature": 1.2, "max_tokens": 8, "ignore_eos": True, "allowed_token_ids": ALLOWED}
DRAWN: Json = {"temperature": 1.5, "top_k": 6, "max_tokens": 8, "ignore_eos": True}
"""Few tokens, nearly alike, and a real draft knows of it: so few outcomes that most are predicted, and most tokens were
drafted. (It knows nothing of tokens that are not allowed.)
"""
LEAVING = (40, 30, 20, 8)
"""Tokens of requests that end one after the other."""
SCHEDULED = {1: 4, 2: 2, 3: 0, 4: 3}
"""Drafts by the rows of a step."""


def greedy(name: str, **more: Any) -> Json:
    """Four requests at once."""
    return plans.batches(name, GREEDY, {"max_tokens": TOKENS, "ignore_eos": True}, 4, **more)


def leaving(name: str, **more: Any) -> Json:
    """Four requests at once, then three, two and one."""
    params: list[Json] = [{"max_tokens": most, "ignore_eos": True} for most in LEAVING]
    return plans.batches(name, GREEDY, params, 4, **more)


def processed(name: str, **more: Any) -> Json:
    """Greedy choices from logits that vLLM has changed first, each change beside another one in the same batch."""
    changes: list[Json] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"min_tokens": 12, "stop_token_ids": list(range(0, 4096, 33))},
        {"logit_bias": {str(token): 4.0 for token in range(300, 340)}},
        {"temperature": 0.7, "min_p": 1.0},  # no token but the likeliest
        {"logprobs": 2},
        {"temperature": 1.0, "top_k": 1},
        {"bad_words": ["self", "return"]},
    ]
    params = [{"max_tokens": 16, "ignore_eos": True} | change for change in changes]
    asked = [tokenize(prompt)[:40] for prompt in prompts()[4 : 4 + len(changes)]]
    return plans.batches(name, asked, params, 4, **more)


def greedy_among_sampled(name: str, **more: Any) -> Json:
    """Every other request greedy, the rest sampled."""
    each: list[Json] = [{"temperature": row % 2 * 1.2, "max_tokens": TOKENS, "ignore_eos": True} for row in range(4)]
    return plans.batches(name, GREEDY, each, 4, **more)


def structured(name: str, **more: Any) -> Json:
    """A grammar that leaves one text, at a temperature: whatever is drafted, what comes is known."""
    params = {"temperature": 1.0, "max_tokens": 12, "structured_outputs": {"choice": ["return self"]}}
    return plans.batches(name, GREEDY[:2], params, 2, **more)


def seeded(name: str, **more: Any) -> Json:
    """Drawn with seeds, and each beside another change of the logits in the same batch; two are greedy."""
    changes: list[Json] = [
        {},
        {"top_k": 5},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 0.0},
        {"temperature": 1.3, "min_p": 0.05, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.0, "min_tokens": 12, "stop_token_ids": list(range(0, 4096, 33))},
        {"temperature": 0.8, "structured_outputs": {"regex": "(a|b|c){12,20}"}},
    ]
    params = [
        {"temperature": 1.0, "seed": 1000 + row, "max_tokens": SEEDED_TOKENS, "ignore_eos": True} | change
        for row, change in enumerate(changes)
    ]
    asked = [tokenize(prompt)[:40] for prompt in prompts()[4 : 4 + len(changes)]]
    return plans.batches(name, asked, params, 4, **more)


RAGGED: Json = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 14,  # 448 tokens: fewer than the requests need at once
}
LONGEST_DRAFT = 200
"""The draft's limit there: longer prompts go on without drafts, alone."""


def ragged(name: str, *, sampled: bool = True, **more: Any) -> Json:
    """Requests that come and go: slots used again, prompts in chunks, preemption, the end of the context; with
    `sampled` every other one is drawn with a seed.
    """
    shared = text_of(100, 64)
    asked = [plans.request(f"shared {i}", shared + text_of(1000 + 50 * i, 9), 48, step=2 * i) for i in range(3)]
    asked += [plans.request(f"long {i}", text_of(1500 + 300 * i, 150), 24, step=3 + 3 * i) for i in range(2)]
    asked += [plans.request(f"limit {n}", text_of(3000 + n, n), 16, step=14) for n in (250, 255)]
    asked += [
        plans.request("one token", text_of(401, 1), 1, step=6),
        plans.request("aborted", text_of(250, 40), 60, step=5, abort_after=7),
        plans.request("after the abort", text_of(80, 45), 12, after="aborted"),
        plans.request("the same prompt again", shared + text_of(1000, 9), 12, after="shared 0"),
    ]
    for row in range(0, len(asked) if sampled else 0, 2):  # drawn, but not by chance
        asked[row]["params"] |= {"temperature": 0.9, "seed": row}
    return {"name": name, "kind": "arrivals", "requests": asked, **more}


def samples(name: str, count: int, **more: Any) -> Json:
    """One prompt many times, over a small vocabulary."""
    return plans.batches(name, [SAMPLED_PROMPT] * count, SAMPLED, 32, **more)


def drawn(name: str, count: int, **more: Any) -> Json:
    """One prompt many times, for a real draft."""
    return plans.batches(name, [SAMPLED_PROMPT] * count, DRAWN, 16, **more)
