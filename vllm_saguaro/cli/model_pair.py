"""What doctor says of a target and its draft, from a start that stopped before any weights."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vllm_saguaro.cli import installation
from vllm_saguaro.cli.finding import Finding, error, ok, refused, warning
from vllm_saguaro.cli.weights import WeightsError, read_weights
from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.drafting.buckets import branches_for, default_branches
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE
from vllm_saguaro.drafting.pace import Pace
from vllm_saguaro.vllm_hooks.draft_choice import MIN_COST_RATIO
from vllm_saguaro.vllm_hooks.dry_run import DryRun

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def findings_of(start: DryRun) -> list[Finding]:
    """Everything that can be said of the pair."""
    return [
        models(start),
        vocabulary(start),
        *([installation.plan_of(start.plan)] if start.plan is not None else []),
        *gpu(start),
        *([warning("type", start.slow_type, "start with --dtype float32")] if start.slow_type else []),
        *memory(start),
        kv_cache(start),
        branches(start),
        *lengths(start),
        *server(start),
    ]


def models(start: DryRun) -> Finding:
    """Which draft, and whether it is small enough for its target."""
    text = f"{start.target} with the draft {start.draft}"
    if not (start.target_billions and start.draft_billions):
        return ok("models", text)
    ratio = start.target_billions / start.draft_billions
    text += f": about {_billions(start.target_billions)} and {_billions(start.draft_billions)} parameters a token"
    if ratio < MIN_COST_RATIO:
        return warning(
            "models",
            f"{text}, a ratio of {ratio:.1f}: drafting takes about as long as verifying",
            f"choose a draft that is at least {MIN_COST_RATIO:g} times smaller",
        )
    return ok("models", f"{text}, a ratio of {ratio:.1f}")


def vocabulary(start: DryRun) -> Finding:
    """The agreement was checked by the start itself; here, on what grounds."""
    sizes = f"vocab_size {start.target_vocab} and {start.draft_vocab}"
    if start.target_tokenizer and start.draft_tokenizer:
        return ok("vocabulary", f"the tokenizers agree, {sizes}")
    lacking = start.draft if start.target_tokenizer else start.target
    return warning(
        "vocabulary",
        f"{sizes} fit, but there is no tokenizer.json of {lacking} on this machine to compare",
        "be sure that the draft is of the target's family: another vocabulary of the same size would never be accepted",
    )


def gpu(start: DryRun) -> list[Finding]:
    """Whether the target leaves a GPU to a draft that computes on one of its own."""
    if start.gpu_memory is None or start.config.placement == "stream" or start.gpus > start.ranks:
        return []
    from vllm_saguaro.vllm_hooks.process_draft import free_gpus
    from vllm_saguaro.vllm_hooks.ray_draft import check_cluster

    if start.config.placement == "ray" and check_cluster(start.config) is not None:
        return [
            warning(
                "gpus",
                f"the target takes all {start.gpus} that this process sees",
                "be sure that Ray has another one of this machine, and takes none of these for free",
            )
        ]
    try:
        free_gpus(os.environ, start.gpus, range(start.ranks), start.config.placement)
    except SaguaroConfigError as problem:
        return [refused("gpus", str(problem))]
    return []


def memory(start: DryRun) -> list[Finding]:
    """Weights of both from the headers of their files, and the draft's KV cache, beside what this machine has."""
    found: list[Finding] = []
    needed, parts, known = 0, [], True
    replicas = start.config.draft_replicas
    for name, folder, dtype, copies in (
        ("target", start.target_folder, start.dtype, 1),
        ("draft", start.draft_folder, start.draft_dtype, replicas),
    ):
        try:
            loaded = _loaded_bytes(folder, dtype)
        except WeightsError as problem:
            found.append(error("weights", f"{name}: {str(problem).rpartition(': ')[0]}", "download the model again"))
            loaded = None
        if loaded is None:
            known = False
            continue
        needed += copies * loaded
        parts.append(f"{name} weights {f'{copies} x ' if copies > 1 else ''}{size(loaded)} in {dtype}")
    if not known and not found:
        found.append(
            warning(
                "weights",
                "no safetensors files of one of the models are on this machine: their size is not known",
                "download it first (the server does, too) and ask again",
            )
        )
    if start.gpu_memory is not None:
        return [*found, _memory_of_gpu(start, start.gpu_memory)]
    elsewhere = start.config.placement == "ray"
    needed += replicas * start.draft_kv_bytes
    if start.kv_bytes is not None:
        needed += start.kv_bytes
        parts.append(f"target KV cache {size(start.kv_bytes)}")
    text = ", ".join([*parts, f"draft KV cache {size(replicas * start.draft_kv_bytes)} (touched only as it is used)"])
    available = installation.memory_available()
    if available is None:
        return [*found, ok("memory", text)]
    total, free = available
    text += f"; of {size(total)} here {size(free)} are free"
    share = math.ceil(start.memory_share * total)
    if start.kv_bytes is None and share > free:
        found.append(
            error(
                "memory",
                f"vLLM takes {start.memory_share:.0%} of all memory ({size(share)}), and does not start with "
                f"{size(free)} free",
                f"give it less (--gpu-memory-utilization {0.9 * free / total:.1f}: it means this memory, too), or the "
                "size of its KV cache (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE)",
            )
        )
    if elsewhere or needed <= free:
        return [*found, ok("memory", text)]
    advice = "give the target a smaller KV cache (VLLM_CPU_KVCACHE_SPACE), take a smaller type or draft"
    if needed > total:
        return [*found, error("memory", f"{text}: too little", advice)]
    return [*found, warning("memory", f"{text}: too little until others leave", advice)]


def _memory_of_gpu(start: DryRun, total: int) -> Finding:
    """What must be beside each other on the target's GPU: its weights and, where the draft is on a stream of it, all
    of the draft. vLLM gives the rest of its share to the target's KV cache."""
    target, draft = _known_bytes(start.target_folder, start.dtype), _known_bytes(start.draft_folder, start.draft_dtype)
    here, parts = target, [f"target weights {size(target)} in {start.dtype}"]
    beside = [f"draft weights {size(draft)} in {start.draft_dtype}", f"draft KV cache {size(start.draft_kv_bytes)}"]
    if start.config.placement == "stream":
        here, parts = here + draft + start.draft_kv_bytes, [*parts, *beside]
    share = int(start.memory_share * total)
    text = f"{', '.join(parts)}; vLLM takes {size(share)} of the GPU's {size(total)} at most"
    if start.config.placement != "stream":
        text += f". On another GPU: {', '.join(beside)}"
    if here < share:
        return ok("memory", text)
    return error("memory", f"{text}: too little", "take a smaller type or draft, or less draft_gpu_memory")


def _known_bytes(folder: Path | None, dtype: str) -> int:
    """Bytes of the weights, 0 where they cannot be known, which has been said."""
    try:
        return _loaded_bytes(folder, dtype) or 0
    except WeightsError:
        return 0


def _loaded_bytes(folder: Path | None, dtype: str) -> int | None:
    weights = read_weights(folder) if folder is not None else None
    return weights.bytes_loaded(_ITEM_BYTES.get(dtype, 4)) if weights is not None else None


def kv_cache(start: DryRun) -> Finding:
    """How many texts the draft's KV cache holds."""
    tokens = start.draft_kv_bytes // start.kv_bytes_a_token
    longest = start.config.draft_max_length or start.target_length
    texts = tokens / longest
    text = f"the draft's {size(start.draft_kv_bytes)} of KV hold {tokens} tokens, {texts:.3g} texts of {longest}"
    if texts < 1:
        return warning("draft kv", f"{text}: they are raised to one such text", "write a smaller max_model_len")
    if texts < start.max_num_seqs / 4:
        return warning(
            "draft kv",
            f"{text}, with up to {start.max_num_seqs} requests at once: long ones would go on without drafts",
            "lower --max-num-seqs or max_model_len if requests are as long as that",
        )
    return ok("draft kv", text)


def branches(start: DryRun) -> Finding:
    """N to be expected, alone and in a full batch."""
    config = start.config
    most, steps = config.most_branches, config.num_speculative_tokens
    if config.placement == "stream":
        most = config.branches if isinstance(config.branches, int) else default_branches(steps)
        full = branches_for(start.max_num_seqs, most)
        return ok("branches", f"K = {steps}, N = {most} at most, {full} each for {start.max_num_seqs} at once")
    first = Pace(steps, most, config.chooses_branches).branches(1)
    chosen = f"{first} at first, up to {most}" if config.chooses_branches else f"{most}"
    full = max(1, min(most, MAX_ROWS_A_TREE // start.max_num_seqs))
    return ok(
        "branches",
        f"K = {steps}, N = {chosen} for one request, at most {full} each for {start.max_num_seqs} at once "
        f"({MAX_ROWS_A_TREE} in all)",
    )


def lengths(start: DryRun) -> list[Finding]:
    """Texts that are too long for the draft."""
    longest = start.config.draft_max_length
    if longest >= start.target_length:
        return []
    return [
        warning(
            "lengths",
            f"the draft holds texts of {longest} tokens, the target {start.target_length}: longer ones go on without "
            "drafts",
            "take a draft that is as long, or lower --max-model-len if no request is longer",
        )
    ]


def server(start: DryRun) -> list[Finding]:
    """Options of the server that go with us in part."""
    words = " ".join(start.ignored)
    if "--api-server-count" not in words:
        return []
    return [
        warning(
            "metrics",
            "with several API server processes our own metrics do not reach /metrics",
            "leave --api-server-count out if you want them",
        )
    ]


def size(count: int) -> str:
    """Bytes for a person."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def _billions(amount: float) -> str:
    return f"{amount:.3g} G" if amount >= 0.1 else f"{1e3 * amount:.3g} M"
