"""Which draft goes with a target, and which vocabularies go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.vllm_hooks.draft_choice import (
    check_family,
    check_vocabularies,
    choose_draft,
    resolve_folder,
    token_ids,
)


def target(
    model: str,
    architecture: str,
    vocab: int,
    hidden: int,
    layers: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> SimpleNamespace:
    """What `choose_draft` reads of a ModelConfig, with the numbers of the published config.json."""
    text_config = SimpleNamespace(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **more,
    )
    hf_config = SimpleNamespace(architectures=[architecture])
    return SimpleNamespace(model=model, hf_config=hf_config, hf_text_config=text_config)


LLAMA, QWEN2, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
LLAMA_1B = "meta-llama/Llama-3.2-1B-Instruct"
QWEN3_MOE: dict[str, Any] = {"head_dim": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
QWEN25_05B, CODER_05B = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"
GEMMA3 = "Gemma3ForConditionalGeneration"
TIED: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}


@pytest.mark.parametrize(
    ("config", "draft"),
    [
        (target("meta-llama/Llama-3.1-8B-Instruct", LLAMA, 128256, 4096, 32, 14336, 32, 8), LLAMA_1B),
        (target("meta-llama/Llama-3.3-70B-Instruct", LLAMA, 128256, 8192, 80, 28672, 64, 8), LLAMA_1B),
        (target("Qwen/Qwen3-4B", QWEN3, 151936, 2560, 36, 9728, 32, 8, head_dim=128), "Qwen/Qwen3-0.6B"),
        (target("Qwen/Qwen3-32B", QWEN3, 151936, 5120, 64, 25600, 64, 8, head_dim=128), "Qwen/Qwen3-0.6B"),
        (
            target("Qwen/Qwen3-30B-A3B", "Qwen3MoeForCausalLM", 151936, 2048, 48, 6144, 32, 4, **QWEN3_MOE),
            "Qwen/Qwen3-0.6B",
        ),
        (target("Qwen/Qwen2.5-7B-Instruct", QWEN2, 152064, 3584, 28, 18944, 28, 4), QWEN25_05B),
        (target("Qwen/Qwen2.5-3B-Instruct", QWEN2, 151936, 2048, 36, 11008, 16, 2), QWEN25_05B),
        (target("Qwen/Qwen2.5-Coder-32B-Instruct", QWEN2, 152064, 5120, 64, 27648, 40, 8), CODER_05B),
        (target("google/gemma-3-4b-it", GEMMA3, 262208, 2560, 34, 10240, 8, 4, **TIED), "google/gemma-3-270m-it"),
        (target("google/gemma-3-12b-it", GEMMA3, 262208, 3840, 48, 15360, 16, 8, **TIED), "google/gemma-3-1b-it"),
        (
            target("google/gemma-2-27b-it", "Gemma2ForCausalLM", 256000, 4608, 46, 36864, 32, 16, **TIED),
            "google/gemma-2-2b-it",
        ),
        (
            target("mistralai/Mistral-Large-Instruct-2407", "MistralForCausalLM", 32768, 12288, 88, 28672, 96, 8),
            "mistralai/Mistral-7B-Instruct-v0.3",
        ),
        (
            target("allenai/OLMo-2-1124-7B-Instruct", "Olmo2ForCausalLM", 100352, 4096, 32, 11008, 32, 32),
            "allenai/OLMo-2-0425-1B-Instruct",
        ),
        (
            target("HuggingFaceTB/SmolLM2-1.7B-Instruct", LLAMA, 49152, 2048, 24, 8192, 32, 32),
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model,
)
def test_the_family_table(config: SimpleNamespace, draft: str) -> None:
    assert choose_draft(config) == draft


@pytest.mark.parametrize(
    "config",
    [
        target("meta-llama/Llama-3.2-3B-Instruct", LLAMA, 128256, 3072, 28, 8192, 24, 8, tie_word_embeddings=True),
        target(LLAMA_1B, LLAMA, 128256, 2048, 16, 8192, 32, 8, tie_word_embeddings=True),
        target("Qwen/Qwen3-0.6B", QWEN3, 151936, 1024, 28, 3072, 16, 8, head_dim=128, tie_word_embeddings=True),
        target("Qwen/Qwen2.5-1.5B", QWEN2, 151936, 1536, 28, 8960, 12, 2, tie_word_embeddings=True),
        target("google/gemma-2-9b-it", "Gemma2ForCausalLM", 256000, 3584, 42, 14336, 16, 8, **TIED),
        target("mistralai/Mistral-7B-Instruct-v0.3", "MistralForCausalLM", 32768, 4096, 32, 14336, 32, 8),
    ],
    ids=lambda value: value.model,
)
def test_no_draft_that_is_not_clearly_smaller(config: SimpleNamespace) -> None:
    with pytest.raises(SaguaroConfigError, match=r"no draft model is known.*too small for"):
        choose_draft(config)


def test_an_unknown_family_is_told_what_to_write() -> None:
    with pytest.raises(SaguaroConfigError) as caught:
        choose_draft(target("some/model", "StrangeForCausalLM", 5000, 4096, 32, 11008, 32, 32))
    assert str(caught.value) == (
        "no draft model is known for the target some/model (StrangeForCausalLM, vocabulary of 5000): name a small "
        'model with the same vocabulary, --speculative-config \'{"method": "saguaro", "model": "DRAFT", '
        '"num_speculative_tokens": 4}\', or put one into the folder draft/ of a local target'
    )


def test_a_local_target_may_bring_its_draft(make_model: Callable[..., Path]) -> None:
    folder = make_model("target")
    draft = make_model("target/draft")
    assert choose_draft(SimpleNamespace(model=str(folder))) == str(draft)


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_hub_names_are_left_to_vllm(name: str) -> None:
    assert resolve_folder(name) == name


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "../none", "~/none-at-all", "a/b/c"])
def test_a_missing_folder(path: str) -> None:
    with pytest.raises(SaguaroConfigError, match="the draft folder does not exist: "):
        resolve_folder(path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SaguaroConfigError, match=r"holds no config\.json"):
        resolve_folder(str(tmp_path))


def test_a_folder_in_the_home_directory(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("draft")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_folder("~/draft") == str(folder)


def vocabularies(target_folder: Path, target_size: int, draft_folder: Path, draft_size: int) -> None:
    check_vocabularies("T", target_size, str(target_folder), str(draft_folder), draft_size)


def test_padding_is_fine_where_the_tokens_agree(make_model: Callable[..., Path]) -> None:
    one, other = make_model("one"), make_model("other")
    vocabularies(one, 320, other, 320)
    vocabularies(one, 300, other, 512)


def test_a_few_added_tokens_are_fine(make_model: Callable[..., Path]) -> None:
    vocabularies(make_model("one", tokens=300), 320, make_model("other", tokens=304), 320)


def test_other_tokens_are_not_even_at_equal_sizes(make_model: Callable[..., Path]) -> None:
    with pytest.raises(SaguaroConfigError, match="do not match: 300 of 300 common ids are different tokens"):
        vocabularies(make_model("one"), 320, make_model("other", word="x"), 320)


def test_many_missing_tokens_are_not(make_model: Callable[..., Path]) -> None:
    with pytest.raises(SaguaroConfigError, match="do not match"):
        vocabularies(make_model("one", tokens=300), 320, make_model("other", tokens=200), 320)


@pytest.mark.parametrize(("target_size", "draft_size"), [(152064, 151936), (262208, 262144), (32000, 32000)])
def test_without_tokenizers_the_sizes_decide(target_size: int, draft_size: int) -> None:
    check_vocabularies("org/t", target_size, "org/no-such-t", "org/no-such-d", draft_size)


@pytest.mark.parametrize(("target_size", "draft_size"), [(128256, 151936), (32000, 32768), (131072, 128256)])
def test_without_tokenizers_other_sizes_do_not_match(target_size: int, draft_size: int) -> None:
    with pytest.raises(SaguaroConfigError, match=rf"vocab_size {target_size}.*vocab_size {draft_size}.*do not match"):
        check_vocabularies("org/t", target_size, "org/no-such-t", "org/no-such-d", draft_size)


def test_tokenizer_files_of_either_kind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 2, "content": "<s>"}], "model": {"vocab": [["a", -1.0], ["b", -2.0]]}}'
    )
    assert token_ids(str(tmp_path)) == {0: "a", 1: "b", 2: "<s>"}
    (tmp_path / "tokenizer.json").write_text("no JSON")
    assert token_ids(str(tmp_path)) is None
    assert token_ids(str(tmp_path / "none")) is None


KINDS = ("is_attention_free", "is_hybrid", "is_encoder_decoder", "uses_mrope")


def draft_that(*is_so: str) -> SimpleNamespace:
    """What `check_family` reads of a ModelConfig."""
    return SimpleNamespace(model="my/draft", **{kind: kind in is_so for kind in KINDS})


def test_a_draft_with_attention_in_every_layer_is_taken() -> None:
    check_family(draft_that())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        *((kind, "recurrent state") for kind in KINDS[:2]),
        ("is_encoder_decoder", "has an encoder"),
        ("uses_mrope", "several dimensions"),
    ],
)
def test_a_draft_whose_state_cannot_be_branched_is_refused(kind: str, why: str) -> None:
    with pytest.raises(SaguaroConfigError, match=f"my/draft cannot draft.*{why}.*write as") as caught:
        check_family(draft_that(kind))
    assert "\n" not in str(caught.value)
