"""What the words after `--` make of an engine that `vllm-saguaro tune` starts."""

from __future__ import annotations

import pytest

import vllm_saguaro
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
