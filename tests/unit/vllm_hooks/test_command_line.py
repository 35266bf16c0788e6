"""What vLLM's argument parser makes of the method's name, its keys, and of everything else."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_saguaro
from vllm_saguaro.vllm_hooks.engine_args import CommandLineMethod, CommandLineOptions


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    vllm_saguaro.register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser: argparse.ArgumentParser, *words: str) -> EngineArgs:
    return EngineArgs.from_cli_args(parser.parse_args(["--model", "m", *words]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--speculative-config", "saguaro"), {"method": "saguaro"}),
        (("-sc", "saguaro"), {"method": "saguaro"}),
        (("--speculative-config", '{"method": "saguaro", "branches": 6}'), {"method": "saguaro", "branches": 6}),
        (
            ("--speculative-config.method", "saguaro", "--speculative-config.draft_cpus", "1"),
            {"method": "saguaro", "draft_cpus": 1},
        ),
    ],
)
def test_the_command_line_takes_the_method(
    parser: argparse.ArgumentParser, words: tuple[str, ...], expected: dict[str, Any]
) -> None:
    options = parse(parser, *words).speculative_config
    assert options == expected
    assert isinstance(options, CommandLineOptions)
    assert isinstance(pickle.loads(pickle.dumps(options)), CommandLineOptions)


def test_the_command_line_takes_the_flags(parser: argparse.ArgumentParser) -> None:
    arguments = parse(parser, "--spec-method", "saguaro", "--spec-model", "d", "--spec-tokens", "5")
    assert isinstance(arguments.spec_method, CommandLineMethod)
    assert (arguments.spec_method, arguments.spec_model, arguments.spec_tokens) == ("saguaro", "d", 5)


def test_a_config_file_takes_word_and_dict(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("speculative-config: saguaro\n")
    assert parse(parser, "--config", str(file)).speculative_config == {"method": "saguaro"}
    file.write_text("speculative-config:\n  method: saguaro\n  branches: 6\n")
    assert parse(parser, "--config", str(file)).speculative_config == {"method": "saguaro", "branches": 6}


def test_a_wrong_key_is_an_argparse_error(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser, "--speculative-config", '{"method": "saguaro", "branchs": 6}')
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: argument --speculative-config/-sc: unknown key "branchs" in the speculative config: did you' in last


@pytest.mark.parametrize(("text", "word"), [("saguro", "saguro"), ('{"method": "Saguaro"}', "Saguaro")])
def test_a_misspelt_method_is_an_argparse_error(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], text: str, word: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser, "--speculative-config", text)
    assert caught.value.code == 2
    assert f'unknown method "{word}": did you mean "saguaro"?' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--speculative-config", "None"),
        ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'),
        ("--spec-method", "ngram", "--spec-tokens", "2"),
    ],
)
def test_other_words_are_parsed_as_without_the_plugin(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
    plain = EngineArgs.add_cli_args.__wrapped__(FlexibleArgumentParser())
    ours, theirs = parse(parser, *words), parse(plain, *words)
    assert type(ours.speculative_config) is type(theirs.speculative_config)
    assert (ours.speculative_config, ours.spec_method) == (theirs.speculative_config, theirs.spec_method)


def test_a_word_that_is_no_json_stays_vllms_error(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(parser, "--speculative-config", "cactus")
    assert "Value cactus cannot be converted to" in capsys.readouterr().err
