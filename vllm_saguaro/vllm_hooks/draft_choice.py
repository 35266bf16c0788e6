"""Which draft goes with a target: the choice when the user named none, and the check that the vocabularies agree.

Only configurations and tokenizer files are read here, never weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.config import EXAMPLE, SaguaroConfigError
from vllm_saguaro.vllm_hooks.compatibility import one_line

# A draft must cost clearly less than the target, or drafting K tokens takes longer than verifying them.
MIN_COST_RATIO: Final = 4.0

# Families pad their vocabulary by size of model (151936 and 152064, 262144 and 262208). Where the tokenizers cannot be
# compared, a difference up to this share counts as padding.
MAX_PADDING: Final = 0.02
# Siblings rename a few reserved tokens (Llama 3.0 and 3.2): they are never drafted, so a small share may differ.
MAX_RENAMED: Final = 0.01


@dataclass(frozen=True)
class Family:
    """Targets of one family, and the small published sibling that drafts for them.

    `draft_billions` is the draft's size; a target below `MIN_COST_RATIO` times that is too small for it.
    `in_name` narrows to targets whose name contains it.
    """

    name: str
    architectures: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    draft: str
    draft_billions: float
    in_name: str = ""


# The first line that fits is taken: narrower lines stand before wider ones, better drafts before smaller ones.
FAMILIES: Final = (
    Family("Llama 3", ("LlamaForCausalLM",), (128256,), "meta-llama/Llama-3.2-1B-Instruct", 1.24),
    Family("Qwen 3", ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), (151936,), "Qwen/Qwen3-0.6B", 0.6),
    Family(
        "Qwen 2.5 Coder",
        ("Qwen2ForCausalLM",),
        (151936, 152064),
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        0.49,
        in_name="qwen2.5-coder",
    ),
    Family("Qwen 2.5", ("Qwen2ForCausalLM",), (151936, 152064), "Qwen/Qwen2.5-0.5B-Instruct", 0.49),
    Family(
        "Gemma 3, 12B and more",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        (262144, 262208),
        "google/gemma-3-1b-it",
        1.0,
    ),
    Family(
        "Gemma 3, 4B",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        (262144, 262208),
        "google/gemma-3-270m-it",
        0.27,
    ),
    Family("Gemma 2, 27B", ("Gemma2ForCausalLM",), (256000,), "google/gemma-2-2b-it", 2.6),
    Family("Mistral Large 2", ("MistralForCausalLM",), (32768,), "mistralai/Mistral-7B-Instruct-v0.3", 7.25),
    Family("OLMo 2", ("Olmo2ForCausalLM",), (100352,), "allenai/OLMo-2-0425-1B-Instruct", 1.48),
    Family("SmolLM2", ("LlamaForCausalLM",), (49152,), "HuggingFaceTB/SmolLM2-135M-Instruct", 0.135, in_name="smollm2"),
)


def choose_draft(target_model_config: Any) -> str:
    """The draft for a target (a vLLM `ModelConfig`) whose user named none.

    A local target folder may bring its own in `draft/`; else the family table decides.
    """
    target = str(target_model_config.model)
    own = Path(target) / "draft"
    if (own / "config.json").is_file():
        return str(own)

    architectures = tuple(getattr(target_model_config.hf_config, "architectures", None) or ())
    text_config = target_model_config.hf_text_config
    vocab_size = int(getattr(text_config, "vocab_size", 0) or 0)
    billions = active_billions(text_config)
    too_small = ""
    for family in FAMILIES:
        if vocab_size not in family.vocab_sizes or not set(architectures) & set(family.architectures):
            continue
        if family.in_name not in target.lower():
            continue
        if billions >= MIN_COST_RATIO * family.draft_billions:
            return family.draft
        too_small = f" (it is too small for {family.draft} to be worth its time)"

    name = ", ".join(architectures) or "of unknown architecture"
    raise SaguaroConfigError(
        f"no draft model is known for the target {target} ({name}, vocabulary of {vocab_size}){too_small}: "
        f"name a small model with the same vocabulary, --speculative-config '{EXAMPLE}', or put one into the folder "
        "draft/ of a local target"
    )


def active_billions(text_config: Any) -> float:
    """Roughly how many parameters a token passes through, in 10^9: the cost of a pass, also of a mixture of experts."""

    def size(name: str, default: int = 0) -> int:
        value = getattr(text_config, name, None)
        return value if isinstance(value, int) else default

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", hidden // heads if heads else 0)
    attention = 2 * hidden * head_dim * (heads + size("num_key_value_heads", heads))
    experts = size("num_experts_per_tok")
    width = experts * size("moe_intermediate_size") if experts else 0
    mlp = 3 * hidden * (width or size("intermediate_size"))
    tables = 1 if getattr(text_config, "tie_word_embeddings", False) else 2
    return (size("num_hidden_layers") * (attention + mlp) + tables * size("vocab_size") * hidden) / 1e9


def resolve_folder(model: str) -> str:
    """A draft given as a local path, checked; a hub name is returned as it is."""
    path = Path(model).expanduser()
    is_path = (
        model.startswith(("/", "./", "../", "~")) or model in (".", "..") or model.count(os.sep) > 1 or path.exists()
    )
    if not is_path:
        return model
    if not path.exists():
        raise SaguaroConfigError(
            f'the draft folder does not exist: {model}; write the folder of a small model as "model"'
        )
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        raise SaguaroConfigError(
            f'the draft folder {model} holds no config.json: write the folder that a model was saved to as "model"'
        )
    return str(path)


def read_vocab_size(target_model_config: Any, passed: Mapping[str, Any]) -> int:
    """The draft's own vocabulary size, from its configuration alone; `passed` are the user's keys for vLLM."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    try:
        hf_config = get_config(
            passed["model"],
            trust_remote_code=target_model_config.trust_remote_code,
            revision=passed.get("revision"),
            code_revision=passed.get("code_revision"),
            config_format=target_model_config.config_format,
        )
        return int(get_hf_text_config(hf_config).vocab_size)
    except Exception as error:  # whatever the hub client or a config class throws, the user gets one line
        raise SaguaroConfigError(
            f"the draft model {passed['model']} cannot be read ({one_line(error)}): write a local folder or a hub name "
            'as "model"'
        ) from error


def check_family(draft: Any) -> None:
    """Refuse a draft (a vLLM `ModelConfig`) whose state cannot be branched: it has to be KV of attention, by blocks.

    Branches share the blocks of a text and copy its last one; a recurrent state has no blocks. Layers with a sliding
    window, experts and latent attention (MLA) are all right.
    """
    if draft.is_attention_free or draft.is_hybrid:
        why = "it has layers with a recurrent state (state-space or linear attention)"
    elif draft.is_encoder_decoder:
        why = "it has an encoder"
    elif draft.uses_mrope:
        why = "its rotary positions have several dimensions"
    else:
        return
    raise SaguaroConfigError(
        f'{draft.model} cannot draft, {why}: write as "model" a small model of the target\'s family that has text '
        "alone and attention in every layer"
    )


def check_vocabularies(
    target: str, target_size: int, target_tokenizer: str, draft: str, draft_size: int, draft_revision: str | None = None
) -> None:
    """Refuse a draft whose token ids mean something else than the target's. Different padding is fine.

    Where both tokenizers are at hand as `tokenizer.json` (a folder, or the hub's cache) they are compared, else the
    sizes. `draft_revision` is the draft's; the target's tokenizer is looked for at its default.
    """
    advice = 'write as "model" a small model of the target\'s own family'
    ours, theirs = token_ids(target_tokenizer), token_ids(draft, draft_revision)
    if ours and theirs:
        common = ours.keys() & theirs.keys()
        differing = sum(ours[token_id] != theirs[token_id] for token_id in common)
        left_out = max(len(ours), len(theirs)) - len(common)
        if differing > MAX_RENAMED * len(common) or left_out > MAX_PADDING * max(len(ours), len(theirs)):
            raise SaguaroConfigError(
                f"the vocabularies of target {target} ({len(ours)} tokens) and draft {draft} ({len(theirs)} tokens) do "
                f"not match: {differing} of {len(common)} common ids are different tokens; {advice}"
            )
        if max(ours) < target_size and max(theirs) < draft_size:
            return  # all else in the two sizes is padding
    if abs(target_size - draft_size) > MAX_PADDING * max(target_size, draft_size):
        raise SaguaroConfigError(
            f"the vocabularies of target {target} (vocab_size {target_size}) and draft {draft} (vocab_size "
            f"{draft_size}) do not match; {advice}"
        )


def token_ids(model: str, revision: str | None = None) -> dict[int, str] | None:
    """The vocabulary as id -> token from `tokenizer.json`, or None where there is no such file on this machine."""
    path: str | Path | None = Path(model) / "tokenizer.json"
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "tokenizer.json", revision=revision)
        except HFValidationError:
            return None
        path = cached if isinstance(cached, str) else None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        vocab = content["model"]["vocab"]
        if isinstance(vocab, dict):
            by_id = {int(token_id): str(token) for token, token_id in vocab.items()}
        else:  # a unigram model: a list of (token, score)
            by_id = {token_id: str(entry[0]) for token_id, entry in enumerate(vocab)}
        by_id.update({int(added["id"]): str(added["content"]) for added in content.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return by_id
