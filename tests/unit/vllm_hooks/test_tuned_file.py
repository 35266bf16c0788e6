"""`"tuned": FILE`, from what the user wrote to what every process of the engine gets."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import vllm.logger
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_saguaro
from tests.unit.test_tuned import FILE, PRIORS, written
from tests.unit.vllm_hooks.test_engine_args import PLAN, ModelMaker, engine, options_of, refusal
from vllm_saguaro import cores
from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.vllm_hooks import engine_args, tuned_file


@pytest.fixture(autouse=True)
def doors(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_saguaro.register()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cores, "apply_in_frontend", lambda *_, **__: PLAN)
    monkeypatch.setattr(cores, "undo_in_frontend", lambda *_: None)


@pytest.fixture
def pair(make_model: ModelMaker) -> Path:
    folder = make_model("target")
    make_model("target/draft")
    return folder


def file_for(pair: Path, tmp_path: Path, **changes: Any) -> str:
    """A tuned file that was made for this pair here."""
    here = tuned_file.served_here(str(pair), str(pair / "draft"), "torch.float32")
    return written(tmp_path, **{"made_for": here.to_dict(), **changes})


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the start says of the file."""
    said: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ours, real = logging.getLogger("saguaro-tuned-test"), vllm.logger.init_logger
    ours.handlers = [Keeping(level=logging.WARNING)]
    name = f"vllm.{engine_args.__name__}"
    monkeypatch.setattr(vllm.logger, "init_logger", lambda which: ours if which == name else real(which))
    return said


def test_the_file_fills_in_what_is_not_written(pair: Path, tmp_path: Path, warnings: list[str]) -> None:
    path = file_for(pair, tmp_path)
    speculation = {"method": "saguaro", "tuned": path, "branches": 8}
    config = engine(pair, speculative_config=speculation).create_engine_config()
    ours = SaguaroConfig.from_dict(options_of(config))
    assert (ours.num_speculative_tokens, ours.branches, ours.backup) == (6, 8, "none")
    assert (ours.tuned, ours.priors) == (path, PRIORS)
    assert config.speculative_config is not None
    assert config.speculative_config.num_speculative_tokens == 6
    assert speculation == {"method": "saguaro", "tuned": path, "branches": 8}
    assert not [text for text in warnings if "tuned" in text]


def test_a_flag_is_written_by_the_user_too(pair: Path, tmp_path: Path) -> None:
    speculation = {"method": "saguaro", "tuned": file_for(pair, tmp_path)}
    config = engine(pair, speculative_config=speculation, spec_tokens=2).create_engine_config()
    assert options_of(config)["num_speculative_tokens"] == 2
    assert options_of(config)["branches"] == 24


def test_the_file_may_name_the_draft(pair: Path, tmp_path: Path, make_model: ModelMaker) -> None:
    other = str(make_model("other"))
    path = file_for(pair, tmp_path, choice={"model": other})
    config = engine(pair, speculative_config={"method": "saguaro", "tuned": path}).create_engine_config()
    assert options_of(config)["draft"]["model"] == other


def test_a_command_line_takes_it(pair: Path, tmp_path: Path) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    speculation = json.dumps({"method": "saguaro", "tuned": file_for(pair, tmp_path)})
    words = ["--model", str(pair), "--dtype", "float32", "--speculative-config", speculation]
    config = EngineArgs.from_cli_args(parser.parse_args(words)).create_engine_config()
    assert options_of(config)["num_speculative_tokens"] == 6


def test_a_file_of_something_else_is_used_with_one_warning(pair: Path, tmp_path: Path, warnings: list[str]) -> None:
    path = written(tmp_path)
    config = engine(pair, speculative_config={"method": "saguaro", "tuned": path}).create_engine_config()
    assert options_of(config)["num_speculative_tokens"] == 6
    (said,) = [text for text in warnings if "tuned" in text]
    assert said.startswith(f"Saguaro, tuned file {path}: it was measured with target t, here {pair}; draft d, here ")
    assert said.endswith("its choice may be wrong here.")
    assert "\n" not in said


def test_the_same_models_elsewhere_are_no_difference(
    pair: Path, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_for(pair, tmp_path)
    monkeypatch.chdir(pair.parent)
    engine(pair.name, speculative_config={"method": "saguaro", "tuned": path}).create_engine_config()
    assert not [text for text in warnings if "tuned" in text]


def test_a_file_that_is_none_is_refused_before_any_model(pair: Path, tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing.json")
    assert f"tuned: {nothing} cannot be read" in refusal(pair, {"method": "saguaro", "tuned": nothing})
    assert "tuned must be the path of a file, not 7" in refusal(pair, {"method": "saguaro", "tuned": 7})
    broken = written(tmp_path, choice={"branches": "many"})
    assert "is damaged (branches must be a whole number" in refusal(pair, {"method": "saguaro", "tuned": broken})


def test_a_refusal_of_what_the_file_fills_in_names_the_file(pair: Path, tmp_path: Path) -> None:
    path = file_for(pair, tmp_path, choice={"placement": "inline", "branches": 8})
    speculation = {"method": "saguaro", "tuned": path, "draft_replicas": 2, "branches": 4}
    said = refusal(pair, speculation)
    assert said.startswith("draft_replicas is 2, but with placement")
    assert said.endswith(f' (the tuned file {path} has {{"placement": "inline"}})')
    assert "\n" not in said
    path = file_for(pair, tmp_path, choice={"placement": "stream"})
    assert refusal(pair, {"method": "saguaro", "tuned": path}).endswith('has {"placement": "stream"})')
    assert "tuned" not in refusal(pair, {"method": "saguaro", "tuned": path, "placement": "stream"})


def test_a_machine_is_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: (3, 5, 7))
    assert tuned_file.served_here("t", "d", "float32").machine.endswith(", 3 cores")


def test_on_a_command_line_it_is_the_end_with_one_line(pair: Path, tmp_path: Path) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    speculation = json.dumps({"method": "saguaro", "tuned": str(tmp_path / "nothing.json")})
    arguments = EngineArgs.from_cli_args(parser.parse_args(["--model", str(pair), "--speculative-config", speculation]))
    with pytest.raises(SystemExit, match=r"^vllm_saguaro: tuned: .*nothing.json cannot be read"):
        arguments.create_engine_config()


def test_null_is_no_file(pair: Path) -> None:
    config = engine(pair, speculative_config={"method": "saguaro", "tuned": None}).create_engine_config()
    assert SaguaroConfig.from_dict(options_of(config)).priors is None


def test_the_file_in_these_tests_is_whole() -> None:
    assert set(FILE) == {"kind", "format", "recommended", "choice", "priors", "made_for"}
