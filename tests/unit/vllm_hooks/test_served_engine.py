"""What the words after `--` make of an engine that `vllm-saguaro tune` starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

import vllm_saguaro
from tests.unit.vllm_hooks.test_engine_args import ModelMaker
from vllm_saguaro.vllm_hooks import served_engine


@pytest.fixture(autouse=True)
def doors() -> None:
    vllm_saguaro.register()


def test_words_are_read_as_a_server_reads_them() -> None:
    words = ["--max_num_seqs", "16", "-O0", "--port", "8000"]
    arguments = served_engine._arguments("target", words)
    assert (arguments.model, arguments.max_num_seqs, str(arguments.optimization_level)) == ("target", 16, "0")


@pytest.mark.parametrize(
    "words",
    [
        ["--speculative-config", '{"method": "saguaro", "draft_cpus": "1", "model": "d"}'],
        ["--speculative_config.method=saguaro", "--speculative-config.draft-cpus", '"1"', "--spec-model", "d"],
    ],
)
def test_the_keys_that_are_written_are_found_however_they_are_written(words: list[str]) -> None:
    assert served_engine.written_speculation("target", words) == {"draft_cpus": "1", "model": "d"}


def sizes(target: Path, usage: UsageContext) -> tuple[int, int]:
    scheduler = EngineArgs(model=str(target), dtype="float32").create_engine_config(usage).scheduler_config
    return scheduler.max_num_batched_tokens, scheduler.max_num_seqs


def test_an_engine_in_this_process_has_the_sizes_of_a_server(make_model: ModelMaker) -> None:
    target = make_model("target")
    before = sizes(target, UsageContext.LLM_CLASS)
    with served_engine.sized_as_a_server():
        assert sizes(target, UsageContext.LLM_CLASS) == sizes(target, UsageContext.OPENAI_API_SERVER) != before
    assert sizes(target, UsageContext.LLM_CLASS) == before
