"""From the user's word to vLLM's configuration objects. No weights are loaded: the models are folders without any."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm.logger
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

import vllm_saguaro
from vllm_saguaro import cores
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.vllm_hooks import engine_args
from vllm_saguaro.vllm_hooks.engine_args import (
    OPTIONS_ATTRIBUTE,
    V2_CPU_WORKER_CLASS,
    WORKER_CLASS,
    CommandLineMethod,
    CommandLineOptions,
)

ModelMaker = Callable[..., Path]
Planned = tuple[str | None, int, int]
"""draft_cpus and ranks, as the core planner was asked."""
PLAN = cores.CorePlan((0, 1), (2,))
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 2}
DOORS = ("create_speculative_config", "add_cli_args")


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    """Doors open, no hub to wait for, and no environment changed by the core planner; what it was asked for."""
    vllm_saguaro.register()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    calls: list[Planned] = []

    def plan(draft_cpus: str | None, ranks: int, drafts: int) -> cores.CorePlan:
        calls.append((draft_cpus, ranks, drafts))
        return PLAN

    monkeypatch.setattr(cores, "apply_in_frontend", plan)
    return calls


@pytest.fixture
def pair(make_model: ModelMaker) -> Path:
    """A target folder with a draft of its own; the draft is shorter."""
    folder = make_model("target")
    make_model("target/draft", max_position_embeddings=256)
    return folder


def engine(model: Path | str, **arguments: Any) -> EngineArgs:
    return EngineArgs(model=str(model), max_model_len=512, dtype="float32", **arguments)


def refusal(model: Path | str, options: Any, **arguments: Any) -> str:
    with pytest.raises(SaguaroConfigError) as caught:
        engine(model, speculative_config=options, **arguments).create_engine_config()
    message = str(caught.value)
    assert "\n" not in message
    return message


def options_of(config: Any) -> dict[str, Any]:
    return getattr(config.speculative_config, OPTIONS_ATTRIBUTE)


# What is asked for


@pytest.mark.parametrize("word", ["saguaro", {"method": "saguaro"}, CommandLineOptions(method="saguaro")])
def test_the_word_alone_takes_the_targets_own_draft(pair: Path, word: Any, planned: list[Planned]) -> None:
    arguments = engine(pair, speculative_config=word)
    config = arguments.create_engine_config()

    speculative = config.speculative_config
    assert speculative is not None
    assert (speculative.method, speculative.num_speculative_tokens) == ("draft_model", 4)
    assert speculative.model == str(pair / "draft")
    assert not speculative.disable_padded_drafter_batch, "vLLM's own drafter is still constructed, and refuses it"
    assert speculative.draft_model_config.max_model_len == 512, "vLLM is told the target's limit"
    assert config.model_config.max_model_len == 512
    assert config.parallel_config.worker_cls == WORKER_CLASS

    options = options_of(config)
    ours = SaguaroConfig.from_dict(options)
    assert ours == SaguaroConfig(draft_max_length=256), "the true limit is kept"
    assert planned == [(None, 1, 1)]
    assert options["cores"] == PLAN.to_dict()
    assert json.loads(json.dumps(options)) == options
    assert config.additional_config == {}
    assert options["target_vocab_size"] == 320
    assert options["draft"] == {
        "model": str(pair / "draft"),
        "revision": None,
        "code_revision": None,
        "trust_remote_code": False,
        "config_format": "auto",
        "dtype": "float32",
        "quantization": None,
        "max_model_len": 256,
        "seed": 0,
        "enforce_eager": False,
        "compilation_mode": None,
        "attention_backend": None,
        "kv_cache_dtype": "auto",
        "moe_backend": None,
        "load_format": "auto",
        "download_dir": None,
    }
    assert arguments.speculative_config is word, "the arguments stay as the user wrote them"


def test_keys_go_where_they_belong(pair: Path, make_model: ModelMaker, planned: list[Planned]) -> None:
    draft = make_model("other", vocab_size=320)
    written = {
        "method": "saguaro",
        "model": str(draft),
        "num-speculative-tokens": 6,
        "max_model_len": 128,
        "branches": 24,
        "fan_out": "geometric",
        "placement": "inline",
        "draft_cpus": "1",
        "backup": "ngram",
        "sampling_c": 0.5,
        "adaptive": True,
        "enforce_eager": True,
        "attention_backend": "CPU_ATTN",
        "draft_load_config": {"load_format": "dummy"},
        "draft_tensor_parallel_size": 1,
        "rejection_sample_method": "standard",
        "draft_sample_method": "coupled",
    }
    config = engine(pair, speculative_config=written, seed=7).create_engine_config()
    options = options_of(config)
    assert SaguaroConfig.from_dict(options) == SaguaroConfig(
        branches=24,
        fan_out="geometric",
        placement="inline",
        draft_cpus="1",
        backup="ngram",
        sampling_c=0.5,
        adaptive=True,
        draft_sample_method="coupled",
        num_speculative_tokens=6,
        draft_max_length=128,
    )
    assert planned == []
    assert options["cores"] is None, "inline, the draft has no cores of its own"
    draft_options = options["draft"]
    assert draft_options["model"] == str(draft)
    assert draft_options["enforce_eager"]
    assert (draft_options["attention_backend"], draft_options["load_format"]) == ("CPU_ATTN", "dummy")
    assert (draft_options["seed"], draft_options["max_model_len"]) == (7, 128)
    assert config.speculative_config is not None
    assert config.speculative_config.num_speculative_tokens == 6


@pytest.mark.parametrize("method", ["coupled", "probabilistic", "greedy"])
def test_how_drafts_are_drawn_is_ours_and_not_vllms(pair: Path, method: str) -> None:
    """vLLM knows no "coupled", and would run its own drafter otherwise for the other two."""
    plain = engine(pair, speculative_config="saguaro").create_engine_config().speculative_config
    written = {"method": "saguaro", "draft_sample_method": method}
    config = engine(pair, speculative_config=written).create_engine_config()
    assert options_of(config)["draft_sample_method"] == method
    assert config.speculative_config is not None
    assert plain is not None
    assert config.speculative_config.draft_sample_method == plain.draft_sample_method


def test_requests_with_min_p_are_let_in_where_the_method_is_asked_for(pair: Path) -> None:
    ours = engine(pair, speculative_config="saguaro").create_engine_config().speculative_config
    params = SamplingParams(temperature=1.0, min_p=0.1)
    params._validate_spec_decode(ours)
    theirs = engine(pair, speculative_config=DRAFT_MODEL | {"model": str(pair / "draft")}).create_engine_config()
    with pytest.raises(VLLMValidationError, match="min_p"):
        params._validate_spec_decode(theirs.speculative_config)


def test_the_flags_do_the_same(pair: Path) -> None:
    arguments = engine(pair, spec_method="saguaro", spec_model=str(pair / "draft"), spec_tokens=3)
    options = options_of(arguments.create_engine_config())
    assert (options["num_speculative_tokens"], options["draft"]["model"]) == (3, str(pair / "draft"))
    assert (arguments.spec_method, arguments.spec_tokens) == ("saguaro", 3)
    again = engine(pair, speculative_config={"branches": 6}, spec_method="saguaro").create_engine_config()
    assert options_of(again)["branches"] == 6


def test_one_dict_and_one_arguments_object_serve_twice(pair: Path) -> None:
    written = {"method": "saguaro", "branches": 6}
    arguments = engine(pair, speculative_config=written, additional_config={"other": 1})
    first = arguments.create_engine_config()
    again = arguments.create_engine_config()
    other = engine(pair, speculative_config=written).create_engine_config()
    assert written == {"method": "saguaro", "branches": 6}
    assert first.additional_config == again.additional_config == {"other": 1}
    pages = [options_of(config).pop("counters") for config in (first, again, other)]
    assert len(set(pages)) == 3, "each engine counts on a page of its own"
    assert options_of(first) == options_of(again) == options_of(other)


def test_a_trace_is_begun_before_anything_is_loaded(pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    config = engine(pair, speculative_config={"method": "saguaro", "trace": str(path)}).create_engine_config()
    assert SaguaroConfig.from_dict(options_of(config)).trace == str(path)
    assert path.read_text(encoding="utf-8") == "[\n"


def test_a_trace_that_cannot_be_written_is_refused(pair: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    said = refusal(pair, {"method": "saguaro", "trace": str(missing / "trace.json")})
    assert said == f"trace: there is no folder {missing}: make it, or name a file in one that is there"


@pytest.mark.parametrize("endpoint", [None, "grpc://localhost:4317"])
def test_requests_have_spans_of_their_own_where_they_are_traced(
    pair: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str | None
) -> None:
    opened: list[bool] = []
    monkeypatch.setattr(engine_args, "_open_door_of_spans", lambda: opened.append(True))
    engine(pair, speculative_config="saguaro", otlp_traces_endpoint=endpoint).create_engine_config()
    assert bool(opened) == (endpoint is not None)


def test_our_options_do_not_change_what_vllm_compiles(pair: Path) -> None:
    few, many = (engine(pair, speculative_config={"method": "saguaro", "branches": n}) for n in (6, 12))
    assert few.create_engine_config().compute_hash() == many.create_engine_config().compute_hash()


def test_vllm_is_given_a_schedule_for_k_so_that_it_does_not_pad_with_drafts_of_its_own(pair: Path) -> None:
    for written, expected in (({}, [(1, 1, 4)]), ({"num_speculative_tokens_per_batch_size": [(1, 8, 2)]}, [(1, 8, 2)])):
        config = engine(pair, speculative_config={"method": "saguaro", **written}).create_engine_config()
        assert config.speculative_config is not None
        assert config.speculative_config.num_speculative_tokens_per_batch_size == expected


def test_the_draft_may_hold_a_little_more_than_the_target_where_it_can(pair: Path, make_model: ModelMaker) -> None:
    long = make_model("long", vocab_size=320, max_position_embeddings=4096)
    config = engine(pair, speculative_config={"method": "saguaro", "model": str(long)}).create_engine_config()
    assert options_of(config)["draft_max_length"] == config.model_config.max_model_len + 4 + 1


def test_eager_falls_back_to_the_targets(pair: Path) -> None:
    config = engine(pair, speculative_config="saguaro", enforce_eager=True).create_engine_config()
    assert options_of(config)["draft"]["enforce_eager"]


@pytest.mark.parametrize(
    ("written", "mode"),
    [({"compilation_config": {"mode": 0}}, 0), ({"optimization_level": 0}, 0), ({"enforce_eager": True}, None)],
    ids=["a mode", "no optimisation", "eager, which is another key"],
)
def test_the_draft_is_compiled_as_the_target_is(pair: Path, written: dict[str, Any], mode: int | None) -> None:
    options = options_of(engine(pair, speculative_config="saguaro", **written).create_engine_config())
    assert options["draft"]["compilation_mode"] == mode
    assert json.loads(json.dumps(options)) == options


# Vocabularies


@pytest.mark.parametrize("draft_size", [304, 384])
def test_padding_passes_vllms_own_check(pair: Path, make_model: ModelMaker, draft_size: int) -> None:
    draft = make_model("padded", vocab_size=draft_size)
    arguments = engine(pair, speculative_config={"method": "saguaro", "model": str(draft)})
    config = pickle.loads(pickle.dumps(arguments.create_engine_config()))  # as vLLM sends it to its workers
    speculative = config.speculative_config
    assert speculative.draft_model_config.get_vocab_size() == config.model_config.get_vocab_size() == 320
    speculative.verify_equal_vocab_size_if_draft_model()
    assert draft_size not in options_of(config)["draft"].values(), "the draft's own configuration says its size"
    assert options_of(config)["target_vocab_size"] == 320
    assert config.model_config.hf_overrides == {}, "the target's own stay untouched"


def test_another_vocabulary_is_refused(pair: Path, make_model: ModelMaker) -> None:
    draft = make_model("foreign", word="x")
    message = refusal(pair, {"method": "saguaro", "model": str(draft)})
    assert "do not match: 300 of 300 common ids are different tokens; write as" in message
    draft = make_model("larger", vocab_size=2000, tokens=1990)
    assert "do not match" in refusal(pair, {"method": "saguaro", "model": str(draft)})


# What cannot be


def test_no_draft_known(make_model: ModelMaker) -> None:
    assert "no draft model is known for the target" in refusal(make_model("alone"), "saguaro")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"branchs": 3}, 'unknown key "branchs" in the speculative config: did you mean "branches"?'),
        ({"model": "./no/such"}, "the draft folder does not exist: ./no/such; write"),
        ({"model": "no-such-organisation/no-such-model"}, "the draft model no-such-organisation/no-such-model cannot"),
        ({"num_speculative_tokens": 17}, "num_speculative_tokens is out of range: 17; write a number from 1 to 16"),
        ({"sampling_c": 2}, 'sampling_c is out of range: 2; write a number from 0 to 1, or "auto"'),
        ({"backup": "slow"}, 'backup: "slow" is not a known value: write "auto" or "none" or "ngram" or "jit"'),
        ({"placement": "rya"}, 'placement: "rya" is not a known value (did you mean "ray"?): write'),
        ({"max_model_len": 300}, "vLLM does not take this draft: "),
        ({"attention_backend": "NONE_SUCH"}, "vLLM does not take this draft: "),
        ({"quantization": "none_such"}, "vLLM does not take this draft: "),
        ({"disable_padded_drafter_batch": True}, 'the key "disable_padded_drafter_batch" does not go with'),
    ],
)
def test_a_wrong_word_gets_one_line(pair: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(pair, {"method": "saguaro", **options})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"worker_cls": "my.Worker"}, "worker_cls is 'my.Worker' already: leave worker_cls out"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "by tensor parallelism alone, decode_context_parallel_size is 2: write decode_context_",
        ),
        ({"pipeline_parallel_size": 2}, "by tensor parallelism alone, pipeline_parallel_size is 2: write pipeline_"),
        ({"data_parallel_size": 2}, "by tensor parallelism alone, data_parallel_size is 2: write data_parallel_size 1"),
        ({"tensor_parallel_size": 2, "nnodes": 2}, "serves a target on one machine"),
        (
            {"distributed_executor_backend": "ray"},
            'put workers of "cpu" into Ray, and distributed_executor_backend is "ray": write "mp", or leave it out',
        ),
        ({"async_scheduling": True}, "cannot go with async_scheduling: leave it out"),
        ({"spec_method": "ngram"}, '--spec-method and "method" in the speculative config say the same'),
        ({"spec_tokens": 3}, '--spec-tokens and "num_speculative_tokens" in the speculative config say the same'),
    ],
)
def test_what_it_cannot_be_combined_with(pair: Path, arguments: dict[str, Any], expected: str) -> None:
    assert expected in refusal(pair, {"method": "saguaro", "num_speculative_tokens": 4}, **arguments)


def test_ranks_and_a_draft_inside_one_of_them(pair: Path) -> None:
    message = refusal(pair, {"method": "saguaro", "placement": "inline"}, tensor_parallel_size=2)
    assert message.endswith('tensor_parallel_size is 2: write placement "process"')


def test_a_target_of_two_ranks_has_a_whole_draft(pair: Path, make_model: ModelMaker, planned: list[Planned]) -> None:
    """Of three heads, which vLLM would refuse to divide by two."""
    draft = make_model("odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=96)
    options = {"method": "saguaro", "model": str(draft)}
    speculative = engine(pair, speculative_config=options, tensor_parallel_size=2).create_engine_config()
    assert speculative.parallel_config.tensor_parallel_size == 2
    found = speculative.speculative_config
    assert found.draft_parallel_config.tensor_parallel_size == 1
    # vLLM's own drafter, which the runner makes first, wants the two equal.
    assert found.target_parallel_config.tensor_parallel_size == 1
    assert planned == [(None, 2, 1)]


def test_a_recurrent_draft_is_refused_before_anything_is_loaded(pair: Path, make_model: ModelMaker) -> None:
    draft = make_model("mamba", architectures=["MambaForCausalLM"], model_type="mamba", state_size=8)
    line = refusal(pair, {"method": "saguaro", "model": str(draft)})
    assert line.startswith(f"{draft} cannot draft, it has layers with a recurrent state")


def test_cores_that_are_not_there(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(draft_cpus: str | None, ranks: int, drafts: int) -> None:
        raise ValueError(f"draft_cpus {draft_cpus} names cores outside")

    monkeypatch.setattr(cores, "apply_in_frontend", refuse)
    assert refusal(pair, {"method": "saguaro", "draft_cpus": "99"}) == "draft_cpus 99 names cores outside"


def test_another_vllm(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    assert "works with vLLM 0.32 and 0.33, this is vLLM 0.40.1" in refusal(pair, "saguaro")
    assert engine(pair).create_engine_config().speculative_config is None, "the others are not asked"


def test_another_platform(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.cpu.CpuPlatform.is_cpu", lambda self: False)
    assert "runs on CUDA and on vLLM's CPU backend" in refusal(pair, "saguaro")


# Model Runner V2


@pytest.fixture
def runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has a Triton, as vLLM is told."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)


def test_runner_v2_gets_its_own_worker_and_stays_asynchronous(
    pair: Path, runner_v2: None, planned: list[Planned]
) -> None:
    arguments = engine(pair, speculative_config="saguaro", async_scheduling=True)
    config = arguments.create_engine_config()
    assert config.parallel_config.worker_cls == V2_CPU_WORKER_CLASS
    assert arguments.async_scheduling is True
    options = options_of(config)
    assert options["placement"] == "stream"
    assert options["cores"] is None
    assert planned == [], "no process needs cores"
    assert config.speculative_config is not None
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None, "V2 marks padding itself"


def test_a_process_beside_runner_v2_gets_cores(pair: Path, runner_v2: None, planned: list[Planned]) -> None:
    config = engine(pair, speculative_config={"method": "saguaro", "placement": "process"}).create_engine_config()
    assert options_of(config)["cores"] == PLAN.to_dict()
    assert planned == [(None, 1, 1)]


def test_runner_v2_says_that_no_gpu_has_run_it(
    pair: Path, runner_v2: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM sets up its loggers anew whenever it likes, which takes the handlers of those below them away.
    ours, real = logging.getLogger("saguaro-test"), vllm.logger.init_logger
    name = f"vllm.{engine_args.__name__}"
    monkeypatch.setattr(vllm.logger, "init_logger", lambda which: ours if which == name else real(which))
    with caplog.at_level(logging.WARNING, logger=ours.name):
        engine(pair, speculative_config="saguaro").create_engine_config()
    assert sum("no GPU has run this release" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"tensor_parallel_size": 2, "enable_batch_sharded_sampling": True},
            "has every rank sample requests of its own",
        ),
        ({"enable_dbo": True}, "does not go with dual batch overlap"),
        ({"watermark_config": {}}, "does not go with watermark_config"),
    ],
)
def test_what_runner_v2_cannot_be_combined_with(
    pair: Path, runner_v2: None, arguments: dict[str, Any], line: str
) -> None:
    assert line in refusal(pair, "saguaro", **arguments)


def test_a_stream_is_refused_on_a_plain_cpu(pair: Path) -> None:
    line = refusal(pair, {"method": "saguaro", "placement": "stream"})
    assert line.startswith('placement "stream" drafts on a GPU with model runner V2, this is vLLM\'s CPU backend')


@pytest.mark.parametrize("options", [CommandLineOptions(method="saguaro", branches=0), CommandLineOptions()])
def test_from_the_command_line_an_error_ends_the_program(make_model: ModelMaker, options: dict[str, Any]) -> None:
    flags = {} if options else {"spec_method": CommandLineMethod("saguaro")}
    with pytest.raises(SystemExit) as caught:
        engine(make_model("alone"), speculative_config=options or None, **flags).create_engine_config()
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("vllm_saguaro: ")
    assert "\n" not in caught.value.code


# What does not concern us


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        {"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 2},
    ],
)
def test_other_methods_get_what_they_would_without_the_plugin(
    pair: Path, options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options and "model" in options:
        options["model"] = str(pair / "draft")
    with_plugin = engine(pair, speculative_config=options and dict(options)).create_engine_config()
    with monkeypatch.context() as patch:
        for name in DOORS:
            original = getattr(EngineArgs, name).__wrapped__
            patch.setattr(EngineArgs, name, staticmethod(original) if name == "add_cli_args" else original)
        without = engine(pair, speculative_config=options and dict(options)).create_engine_config()
    assert with_plugin.compute_hash() == without.compute_hash()
    assert described(with_plugin) == described(without)
    assert with_plugin.additional_config == without.additional_config == {}
    if options:
        ours, theirs = with_plugin.speculative_config, without.speculative_config
        objects = {name for name in vars(ours) if name.endswith("_config") and name != "draft_load_config"}
        assert {k: v for k, v in vars(ours).items() if k not in objects} == {
            k: v for k, v in vars(theirs).items() if k not in objects
        }


def described(config: Any) -> str:
    return re.sub(r"\d{12,}", "TIME", repr(config))  # the only thing in it that differs from one to the next


def test_other_methods_errors_stay_vllms(pair: Path) -> None:
    with pytest.raises(ValueError, match="mutually exclusive") as caught:
        engine(pair, speculative_config={"method": "suffix"}, spec_method="ngram").create_engine_config()
    assert not isinstance(caught.value, SaguaroConfigError)
