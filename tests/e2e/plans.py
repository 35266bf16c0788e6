"""What the engines of the end-to-end tests are asked to do. Plain vLLM gets the same, under the same options."""

from __future__ import annotations

from typing import Any

from tests.e2e.harness import Json, prompts, text_of, tokenize

HELD_OUT, ALONE, TOKENS = 12, 6, 96
SAMPLED_PROMPT = "    def __init__(self, "
SAMPLES, SAMPLED_TOKENS = 512, 3
VARIANTS: dict[str, Json] = {
    "T=0.8": {"temperature": 0.8},
    "T=0.8, top_k=20": {"temperature": 0.8, "top_k": 20},
    "T=1.2, top_p=0.9": {"temperature": 1.2, "top_p": 0.9},
}


def batches(name: str, asked: list[Any], params: Json | list[Json], batch: int, **more: Any) -> Json:
    return {"name": name, "kind": "batches", "prompts": asked, "params": params, "batch": batch, **more}


# ---- greedy ---------------------------------------------------------------------------------------------------------


def greedy(batch: int, name: str | None = None, count: int | None = None, **more: Any) -> Json:
    """Held-out prompts, `batch` at a time; fewer of them one by one, which takes longer."""
    count = count or (ALONE if batch == 1 else HELD_OUT)
    params = {"max_tokens": TOKENS, "ignore_eos": True}
    return batches(name or f"greedy, batch {batch}", list(prompts()[:count]), params, batch, **more)


def mixed() -> Json:
    """Held-out prompts again, every other one greedy, the rest sampled."""
    params: list[Json] = [{"temperature": row % 2 * 1.2, "max_tokens": TOKENS, "ignore_eos": True} for row in range(8)]
    return batches("greedy among sampled", list(prompts()[:8]), params, 8)


def few_tokens() -> Json:
    """`max_tokens` 1, 2 and 3, and prompts of 1 token and of all the tokens that the model may have."""
    asked, params = [], []
    for most in (1, 2, 3):
        for prompt in (text_of(500, 1), text_of(600, 7), text_of(700, 512 - most)):
            asked.append(prompt)
            params.append({"max_tokens": most, "ignore_eos": True})
    for length in (511, 509, 505, 500):  # the text ends at the model's limit, wherever the round stands
        asked.append(text_of(2000 + length, length))
        params.append({"max_tokens": 64, "ignore_eos": True})
    return batches("few tokens", asked, params, 8)


def stops() -> Json:
    return {
        "name": "stops",
        "kind": "stops",
        "prompts": list(prompts()[24:32]),
        "positions": [3, 8, 13, 18, 23, 28, 33, 38],
        "params": {"max_tokens": 48},
    }


ONE_TOKEN: Json = {"temperature": 1.0, "max_tokens": 32, "ignore_eos": True}


def several_outputs() -> Json:
    """Two outputs a prompt, which vLLM refuses to greedy requests: sampling from almost no mass is the same."""
    return batches("n=2", list(prompts()[32:36]), ONE_TOKEN | {"top_p": 1e-6, "n": 2}, 4)


def only_top_k() -> Json:
    """As above, by top_k: another path through vLLM's sampler, and the whole batch without drafts at its first step."""
    return batches("top_k=1", list(prompts()[32:36]), ONE_TOKEN | {"top_k": 1}, 4)


def processed_logits() -> Json:
    """Greedy choices from logits that vLLM has changed first, and that depend on the tokens so far."""
    changes: list[Json] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"min_tokens": 20, "stop_token_ids": list(range(0, 4096, 3))},
        {"allowed_token_ids": list(range(5, 4096, 2))},
        {"logprobs": 3},
    ]
    params = [{"max_tokens": 40, "ignore_eos": True} | change for change in changes for _ in range(2)]
    return batches("processed logits", list(prompts()[36 : 36 + len(params)]), params, len(params))


# ---- arrivals -------------------------------------------------------------------------------------------------------

RAGGED: Json = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 20,  # 640 tokens: far fewer than eight requests need
}


def request(key: str, prompt: list[int], most: int, step: int = 0, **more: Any) -> Json:
    params = {"max_tokens": most, "ignore_eos": True}
    named = {"key": key, "id": more.pop("id", key), "prompt": prompt, "params": params, "step": step}
    return named | {"after": None, "abort_after": None} | more


def ragged_arrivals() -> Json:
    shared = text_of(100, 100)
    asked = [request(f"shared {i}", shared + text_of(1000 + 50 * i, 10), 60, step=3 * i) for i in range(5)]
    asked += [request(f"long {i}", text_of(1500 + 300 * i, 200), 40, step=4 + 6 * i) for i in range(3)]
    asked += [request(f"limit {n}", text_of(3000 + n, n), 64, step=10 + n % 7) for n in (255, 254, 251, 240)]
    asked += [request(f"short {n}", text_of(400 + n, n), n, step=20 + 2 * n) for n in (1, 2, 3)]
    asked += [
        request("again, finished", text_of(50, 30), 20, id="again"),
        request("again, aborted", text_of(250, 90), 60, id="again", after="again, finished", abort_after=9),
        request("again, last", text_of(80, 45), 30, id="again", after="again, aborted"),
        request("aborted in its prompt", text_of(900, 180), 20, step=8, abort_after=0),
        request("aborted in mid-flight", text_of(930, 40), 80, step=12, abort_after=15),
        request("the end", shared + text_of(10, 3), 25, after="again, last"),
        request("the same prompt again", shared + text_of(10, 3), 25, after="the end"),
    ]
    return {"name": "ragged", "kind": "arrivals", "requests": asked}


def with_events(name: str, *events: tuple[int, str]) -> Json:
    """Eight requests of the greedy test at once, and things that happen to the draft at given steps."""
    asked: list[Json] = []
    for row, prompt in enumerate(prompts()[:8]):
        asked.append(request(f"row {row}", [], TOKENS) | {"prompt": prompt})
    what = [{"step": step, "do": do} for step, do in events]
    return {"name": name, "kind": "arrivals", "requests": asked, "events": what}


# ---- sampling -------------------------------------------------------------------------------------------------------


def samples(variant: str) -> Json:
    params = {"n": SAMPLES, "max_tokens": SAMPLED_TOKENS, "ignore_eos": True, **VARIANTS[variant]}
    return batches(variant, [tokenize(SAMPLED_PROMPT)], params, 1)


def seeded(name: str) -> Json:
    """Requests with seeds of their own, six at a time."""
    params = [{"temperature": 0.8, "seed": 7 + row, "max_tokens": 48, "ignore_eos": True} for row in range(12)]
    return batches(name, list(prompts()[48:60]), params, 6)
