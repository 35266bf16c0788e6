"""A start that stops before the weights, with folders that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.vllm_hooks.dry_run import dry_run, plugin_is_loaded

ModelMaker = Callable[..., Path]
SHORT = ("--dtype", "float32", "--max-model-len", "512")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin_is_loaded()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")  # restored afterwards, whatever the planner writes


@pytest.fixture
def pair(make_model: ModelMaker) -> Path:
    folder = make_model("target", hidden_size=128, num_hidden_layers=4)
    make_model("target/draft", max_position_embeddings=256)
    return folder


def test_what_a_start_knows_is_told(pair: Path) -> None:
    start = dry_run(str(pair), None, [*SHORT, "--port", "8000", "--max-num-seqs", "8"])
    assert (start.target, start.draft) == (str(pair), str(pair / "draft"))
    assert (start.target_folder, start.draft_folder) == (pair, pair / "draft")
    assert (start.target_vocab, start.draft_vocab) == (320, 320)
    assert start.target_tokenizer
    assert start.draft_tokenizer
    assert start.target_billions > start.draft_billions > 0
    assert (start.target_length, start.config.draft_max_length, start.max_num_seqs) == (512, 256, 8)
    assert start.kv_bytes_a_token == 2 * 2 * 2 * 32 * 4, "keys and values, layers, heads, their width, float32"
    assert (start.dtype, start.draft_dtype, start.slow_type) == ("float32", "float32", None)
    assert start.plan is not None
    assert start.ignored == ("--port", "8000")
    assert (start.kv_bytes, start.memory_share) == (None, 0.92)


def test_the_drafts_own_vocabulary_is_told_where_it_is_padded_otherwise(pair: Path, make_model: ModelMaker) -> None:
    draft = make_model("padded", vocab_size=324)
    assert dry_run(str(pair), str(draft), SHORT).draft_vocab == 324


def test_words_of_the_speculative_config_are_taken(pair: Path) -> None:
    options = '{"method": "saguaro", "placement": "inline", "num_speculative_tokens": 2}'
    start = dry_run(str(pair), None, [*SHORT, "--speculative-config", options])
    assert (start.config.placement, start.config.num_speculative_tokens, start.plan) == ("inline", 2, None)
    assert dry_run(str(pair), None, [*SHORT, "--spec-method", "saguaro"]).config.placement == "process"


def test_words_are_read_as_a_server_reads_them(pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("max-num-batched-tokens: 1024\n")
    dotted = ["--speculative-config.method", "saguaro", "--speculative_config.branches", "8"]
    start = dry_run(
        str(pair), None, [*SHORT, "--max_num_seqs", "16", *dotted, "-O0", "--config", str(file), "--port=1"]
    )
    assert (start.max_num_seqs, start.config.branches) == (16, 8)
    assert start.ignored == ("--port=1",)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pipeline-parallel-size", "2"], "tensor parallelism alone"),
        (["--speculative-config", '{"method": "ngram"}'], 'method "saguaro" alone'),
        (["--speculative-config.branches", "8"], "names no method: write"),
        (["--speculative-config", '{"method": "saguaro", "model": "x"}'], "named twice"),
        (["--spec-model", "x"], "named twice"),
    ],
)
def test_a_refusal_is_that_of_a_start(words: list[str], says: str, pair: Path) -> None:
    with pytest.raises(SaguaroConfigError, match=says) as caught:
        dry_run(str(pair), str(pair / "draft"), [*SHORT, *words])
    assert "\n" not in str(caught.value)


def test_a_draft_of_another_vocabulary_and_a_missing_target_are_refused(pair: Path, make_model: ModelMaker) -> None:
    other = make_model("other", word="x")
    with pytest.raises(SaguaroConfigError, match="do not match"):
        dry_run(str(pair), str(other), SHORT)
    with pytest.raises(SaguaroConfigError, match="does not take this target") as caught:
        dry_run(str(pair / "nowhere"), str(other), SHORT)
    assert "\n" not in str(caught.value)


def test_options_that_the_parser_refuses_end_it(pair: Path) -> None:
    with pytest.raises(SystemExit):
        dry_run(str(pair), None, ["--dtype", "float7"])
