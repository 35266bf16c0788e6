"""Engines that serve LoRA adapters, and what they are asked: structured output, adapters, and everything at once."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from tests.e2e import plans
from tests.e2e.harness import BASE, TARGET, EngineRun, Json, prompts, run_engines, saguaro, tokenize

SHORT = [prompt for prompt in prompts() if len(tokenize(prompt)) <= 100]
RANK = 8

# ---- adapters -------------------------------------------------------------------------------------------------------


def make_adapter(folder: Path, seed: int, strength: float) -> str:
    """A random LoRA for every linear layer of the pair's target, big enough to change the text."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((TARGET / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shapes = {f"self_attn.{name}_proj": (hidden, heads) for name in "qkv"} | {"self_attn.o_proj": (heads, hidden)}
    shapes |= {f"mlp.{name}_proj": (hidden, inner) for name in ("gate", "up")} | {"mlp.down_proj": (inner, hidden)}
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (width_in, width_out) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, width_in, generator=random) / width_in**0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(width_out, RANK, generator=random) * strength
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    modules = sorted({name.partition(".")[2] for name in shapes})
    description = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return str(folder)


def adapted(folders: list[str]) -> Json:
    """Each of four prompts without an adapter, with the first and with the second, in one batch."""
    each = [folder for _ in range(4) for folder in (None, *folders)]
    asked = [prompt for prompt in SHORT[:4] for _ in range(3)]
    return plans.batches(
        "adapters", asked, {"max_tokens": 40, "ignore_eos": True, "logprobs": 2}, len(asked), adapters=each
    )


def adapted_seeds(folders: list[str]) -> Json:
    params: list[Json] = [{"temperature": 0.8, "seed": row, "max_tokens": 32, "ignore_eos": True} for row in range(4)]
    return plans.batches("adapters, seeds", SHORT[:4], params, 4, adapters=[*folders, *folders])


# ---- structured output ----------------------------------------------------------------------------------------------

SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["alpha", "beta"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "kind", "count", "flags"],
    "additionalProperties": False,
}
PATTERN = r"def (get|set)_[a-z]{3,8}\(self, [a-z]{2,5}\): return self\.[a-z]{3,8}"
CHOICES = ["return self.name + self.name + self.name + self.name", "raise NotImplementedError", "pass # pass # pass"]
EBNF = """root ::= "result = " term (" + " term){2,4}
term ::= "self." [a-c] | "len(" [x-z] ")" | [0-9] [0-9]"""
LARK = """start: "result = " term (" + " term){2,4}
term: "self." /[a-c]/ | "len(" /[x-z]/ ")" | /[0-9]{2}/"""
TERM = r"(self\.[abc]|len\([xyz]\)|[0-9][0-9])"

STRUCTURES: dict[str, Json] = {
    "json": {"json": SCHEMA},
    "regex": {"regex": PATTERN},
    "choice": {"choice": CHOICES},
    "grammar": {"grammar": EBNF},
    "lark grammar": {"grammar": LARK},
}


def follows_schema(text: str) -> bool:
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    return Draft202012Validator(SCHEMA).is_valid(json.loads(text))


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


SATISFIED: dict[str, Callable[[str], bool]] = {
    "json": follows_schema,
    "regex": matches(PATTERN),
    "choice": CHOICES.__contains__,
    "grammar": matches(rf"result = {TERM}( \+ {TERM}){{2,4}}"),
    "lark grammar": matches(rf"result = {TERM}( \+ {TERM}){{2,4}}"),
}


def structured(name: str, **more: Any) -> Json:
    return {"structured_outputs": STRUCTURES[name], "max_tokens": 96, **more}


def structures() -> list[Json]:
    """Greedy ones, each kind alone; all kinds sampled; all kinds with seeds among requests that are free."""
    rows = [plans.batches(name, SHORT[:4], structured(name), 4) for name in STRUCTURES]
    sampled = [structured(name, temperature=1.0) for name in STRUCTURES for _ in range(3)]
    rows.append(plans.batches("sampled", SHORT[: len(sampled)], sampled, len(sampled)))
    seeded: list[Json] = []
    for row, name in enumerate(STRUCTURES):
        seeded += [structured(name, temperature=1.0, seed=row), {"max_tokens": 32, "ignore_eos": True}]
    return [*rows, plans.batches("seeded", SHORT[: len(seeded)], seeded, len(seeded))]


# ---- everything at once ---------------------------------------------------------------------------------------------

NEWLINE = tokenize("\n")[0]
ASKED: list[Json] = [
    {},
    {"presence_penalty": 1.5, "logprobs": 3},
    {"repetition_penalty": 1.4, "stop": ["self.", "):"]},
    {"logit_bias": {NEWLINE: -100.0}, "min_tokens": 12, "stop_token_ids": list(range(0, 4096, 5))},
    {"bad_words": ["self", "return None"]},
    {"allowed_token_ids": list(range(5, 4096, 2)), "logprobs": 0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6, "n": 2},
    {"temperature": 1.0, "min_p": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.8, "seed": 3, "logprobs": 2},
    {"temperature": 1.2, "seed": 4, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "seed": 5, "n": 2, "presence_penalty": 0.5},
]


def everything(folders: list[str]) -> Json:
    """More requests than run at once, of every kind and of many lengths, with and without adapters.

    Without `prompt_logprobs`: with `enable_lora` they end plain vLLM's engine too (0.32, `punica_cpu.py`: it has one
    adapter index a request, and a prompt has a row of logits a token).
    """
    each: list[Json] = [
        {"max_tokens": 24 + 7 * (row % 5), "ignore_eos": True} | one for row, one in enumerate(ASKED * 3)
    ]
    each += [structured(name) for name in STRUCTURES] + [
        structured(name, temperature=1.0, seed=9) for name in STRUCTURES
    ]
    each += [{"temperature": 1.0, "max_tokens": 30, "ignore_eos": True}] * 3  # whose text is not plain's, nor need be
    adapters = [(None, *folders)[row // len(ASKED) % 3] for row in range(len(each))]
    return plans.batches("everything", list(prompts()[: len(each)]), each, len(each), adapters=adapters)


# ---- the engines ----------------------------------------------------------------------------------------------------


def scenarios(folders: list[str]) -> list[Json]:
    return [*structures(), adapted(folders), adapted_seeds(folders), everything(folders)]


def runs() -> dict[str, EngineRun]:
    """The engines by name, started once in a process; what went wrong there is told to every test."""
    return _started().result()


@cache
def _started() -> Future[dict[str, EngineRun]]:
    started: Future[dict[str, EngineRun]] = Future()
    try:
        started.set_result(_run())
    except Exception as error:
        started.set_exception(error)
    return started


def _run() -> dict[str, EngineRun]:
    """Plain vLLM and the twin on a core each, then the draft in a process on both cores."""
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    # A slot more than there are adapters: on the CPU vLLM 0.32 gives a row without one the last slot's weights, as soon
    # as any row of the batch has an adapter (index -1 in `lora_ops.py`). An empty slot changes nothing.
    options: Json = BASE | {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK, "max_num_seqs": 16}
    options |= {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        folders = [make_adapter(Path(folder) / f"adapter-{n}", seed=n, strength=s) for n, s in ((1, 0.07), (2, 0.1))]
        asked = {"scenarios": scenarios(folders)}
        plain = one.submit(run_engines, [{"options": options, **asked}], [first])
        few = saguaro(placement="inline", branches=3)  # the twin drafts on the target's time
        inline = other.submit(run_engines, [{"options": options | few, **asked}], [last])
        (found_plain,), (found_inline,) = plain.result(), inline.result()
        (found_process,) = run_engines([{"options": options | saguaro(adaptive=False), **asked}])
    return {"plain": found_plain, "inline": found_inline, "process": found_process}
