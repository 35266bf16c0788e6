"""The user's keys: what is taken, what is refused, and what the one line says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_saguaro.config import AUTO_MAX_BRANCHES, REFUSED_KEYS, SaguaroConfig, SaguaroConfigError, split_options


def refusal(**options: Any) -> str:
    with pytest.raises(SaguaroConfigError) as caught:
        split_options({"method": "saguaro", **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_bare_word_is_enough() -> None:
    config, passed = split_options({"method": "saguaro"})
    assert config == SaguaroConfig()
    assert passed == {"num_speculative_tokens": 4}


def test_own_keys_and_vllm_keys_are_told_apart() -> None:
    written = {
        "method": "saguaro",
        "model": "draft",
        "num_speculative_tokens": 5,
        "branches": 24,
        "fan-out": "uniform",
        "placement": "inline",
        "draft_cpus": "2-3,6",
        "backup": "jit",
        "sampling_c": 0.25,
        "adaptive": True,
        "draft-restarts": 2,
        "draft-sample-method": "probabilistic",
        "quantization": None,
        "enforce_eager": True,
    }
    before = dict(written)
    config, passed = split_options(written)
    assert config == SaguaroConfig(
        branches=24,
        fan_out="uniform",
        placement="inline",
        draft_cpus="2-3,6",
        backup="jit",
        draft_restarts=2,
        sampling_c=0.25,
        adaptive=True,
        draft_sample_method="probabilistic",
        num_speculative_tokens=5,
    )
    assert passed == {"model": "draft", "num_speculative_tokens": 5, "enforce_eager": True}
    assert written == before


def test_options_cross_processes_as_json() -> None:
    config = SaguaroConfig(
        branches=6,
        draft_cpus="1",
        backup="ngram",
        sampling_c=0.5,
        adaptive=False,
        draft_sample_method="greedy",
        num_speculative_tokens=3,
        draft_max_length=2048,
    )
    travelled = json.loads(json.dumps({**config.to_dict(), "draft": {"model": "x"}}))
    assert SaguaroConfig.from_dict(travelled) == config


def test_a_dotted_option_gives_draft_cpus_as_a_number() -> None:
    assert split_options({"draft_cpus": 1})[0].draft_cpus == "1"


@pytest.mark.parametrize(
    ("key", "near"),
    [("branchs", "branches"), ("fanout", "fan_out"), ("num_speculative_token", "num_speculative_tokens")],
)
def test_a_mistyped_key_is_named_with_its_neighbour(key: str, near: str) -> None:
    message = refusal(**{key: 1})
    assert f'unknown key "{key}"' in message
    assert f'did you mean "{near}"?' in message


def test_an_unlike_key_gets_the_list() -> None:
    assert "write one of method, branches, fan_out" in refusal(zzz=1)


@pytest.mark.parametrize(
    "key",
    [name for name in REFUSED_KEYS if not name.endswith("_")]
    + ["prompt_lookup_max", "suffix_decoding_max_tree_depth", "synthetic_acceptance_length", "dspark_draft_topk"],
)
def test_keys_without_a_meaning_here_are_refused_by_name(key: str) -> None:
    message = refusal(**{key: None})
    assert f'the key "{key}" does not go with method "saguaro"' in message
    assert "leave it out" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"branches": 0}, 'branches is out of range: 0; write a number from 1 to 256, or "auto"'),
        ({"branches": 257}, 'branches is out of range: 257; write a number from 1 to 256, or "auto"'),
        ({"branches": "12"}, 'branches must be a whole number, not "12": write a number from 1 to 256, or "auto"'),
        ({"branches": True}, 'branches must be a whole number, not True: write a number from 1 to 256, or "auto"'),
        ({"branches": 1.5}, 'branches must be a whole number, not 1.5: write a number from 1 to 256, or "auto"'),
        (
            {"num_speculative_tokens": 17},
            "num_speculative_tokens is out of range: 17; write a number from 1 to 16",
        ),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is out of range: 0; write a number from 1 to 16"),
        (
            {"fan_out": "geometrc"},
            'fan_out: "geometrc" is not a known value (did you mean "geometric"?): '
            'write "ranked" or "uncalibrated" or "geometric" or "uniform"',
        ),
        ({"placement": "rya"}, 'placement: "rya" is not a known value (did you mean "ray"?): write "process" or '),
        ({"placement": 3}, 'placement: 3 is not a known value: write "process" or "stream" or "inline" or "ray"'),
        ({"branches": "Auto"}, 'branches must be a whole number, not "Auto"'),
        (
            {"backup": "n-gram"},
            'backup: "n-gram" is not a known value (did you mean "ngram"?): write "auto" or "none" or "ngram" or "jit"',
        ),
        ({"backup": None}, "backup: None is not a known value"),
        ({"sampling_c": -0.1}, 'sampling_c is out of range: -0.1; write a number from 0 to 1, or "auto"'),
        ({"sampling_c": 1.5}, 'sampling_c is out of range: 1.5; write a number from 0 to 1, or "auto"'),
        ({"sampling_c": float("nan")}, 'sampling_c is out of range: nan; write a number from 0 to 1, or "auto"'),
        ({"sampling_c": "0.5"}, 'sampling_c must be a number, not "0.5": write a number from 0 to 1, or "auto"'),
        ({"sampling_c": True}, 'sampling_c must be a number, not True: write a number from 0 to 1, or "auto"'),
        ({"adaptive": "yes"}, 'adaptive must be true or false, not "yes"'),
        ({"adaptive": 1}, "adaptive must be true or false, not 1"),
        ({"draft_restarts": -1}, "draft_restarts is out of range: -1; write a number of at least 0"),
        ({"draft_restarts": True}, "draft_restarts must be a whole number, not True: write a number of at least 0"),
        ({"draft_restarts": "never"}, 'draft_restarts must be a whole number, not "never"'),
        ({"draft_cpus": 1.5}, 'draft_cpus must be a string, not 1.5: write for example "3" or "2-3,6"'),
        ({"max_model_len": 0}, "max_model_len is out of range: 0; write a number of at least 1"),
        ({"enforce_eager": "yes"}, 'enforce_eager must be true or false, not "yes"'),
        ({"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size must be 1, not 2"),
        ({"model": ""}, "model must be the draft's folder or hub name"),
        ({"model": 7}, "model must be the draft's folder or hub name, not 7"),
        ({"rejection_sample_method": "synthetic"}, '"synthetic" changes the output'),
        ({"rejection_sample_method": "fly"}, '"fly" changes the output'),
        ({"rejection_sample_method": "block"}, '"block" is ignored by vLLM\'s CPU runner'),
        ({"rejection_sample_method": "x"}, 'rejection_sample_method: "x" is not a known value: write "standard"'),
        (
            {"draft_sample_method": "gumbel"},
            'draft_sample_method: "gumbel" is not a known value: write "coupled" or "probabilistic" or "greedy"',
        ),
    ],
)
def test_a_wrong_value_gets_one_line(options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**options)


@pytest.mark.parametrize("text", ["", "a", "3-2", "1,,2", "-1", "1-"])
def test_draft_cpus_that_name_no_cores(text: str) -> None:
    assert "draft_cpus: " in refusal(draft_cpus=text)


@pytest.mark.parametrize("text", ["1", "2-3,6", "0, 4-5"])
def test_draft_cpus_that_do(text: str) -> None:
    assert SaguaroConfig(draft_cpus=text).draft_cpus == text


def test_a_long_value_is_cut() -> None:
    assert len(refusal(placement="x" * 500 + "\nsecond line")) < 200


def test_everything_that_can_choose_itself_does_so_by_default() -> None:
    config = SaguaroConfig()
    assert (config.branches, config.backup, config.sampling_c, config.adaptive) == ("auto", "auto", "auto", None)
    assert (config.draft_sample_method, config.fan_out) == ("coupled", "ranked")


def test_room_is_made_for_the_branches_that_may_be_chosen() -> None:
    assert SaguaroConfig().most_branches == SaguaroConfig(branches="auto").most_branches == AUTO_MAX_BRANCHES
    assert SaguaroConfig(branches=7).most_branches == 7
    assert SaguaroConfig(branches=256).most_branches == 256


@pytest.mark.parametrize(
    ("adaptive", "placement", "chooses"),
    [
        (None, "process", True),
        (None, "inline", False),
        (True, "inline", True),
        (False, "process", False),
        (False, "inline", False),
    ],
)
def test_whether_k_follows_what_is_measured(adaptive: bool | None, placement: str, chooses: bool) -> None:
    assert SaguaroConfig(adaptive=adaptive, placement=placement).chooses_itself is chooses


@pytest.mark.parametrize("backup", ["auto", "none", "ngram", "jit"])
@pytest.mark.parametrize("method", ["coupled", "probabilistic", "greedy"])
@pytest.mark.parametrize("sampling_c", [0, 1, 0.5, "auto"])
def test_the_words_that_are_known(backup: str, method: str, sampling_c: float | str) -> None:
    config, passed = split_options({"backup": backup, "draft_sample_method": method, "sampling_c": sampling_c})
    assert (config.backup, config.draft_sample_method, config.sampling_c) == (backup, method, sampling_c)
    assert passed == {"num_speculative_tokens": 4}, "vLLM would take draft_sample_method for its own drafter"


def test_what_vllm_says_when_nothing_was_written_is_our_default() -> None:
    assert split_options({"draft_sample_method": None})[0] == SaguaroConfig()


def test_several_drafts_need_processes_of_their_own() -> None:
    assert SaguaroConfig(draft_replicas=3).draft_replicas == 3
    with pytest.raises(SaguaroConfigError, match=r'draft_replicas is 2, but with placement "inline"'):
        SaguaroConfig(draft_replicas=2, placement="inline")
    assert SaguaroConfig(placement="inline").draft_replicas == 1


@pytest.mark.parametrize("value", [0, 17, True, 1.5, "2"])
def test_a_number_of_drafts_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(SaguaroConfigError, match="draft_replicas"):
        SaguaroConfig(draft_replicas=value)  # type: ignore[arg-type]


def test_a_draft_pool_is_named() -> None:
    config, passed = split_options({"placement": "ray", "draft_pool": "drafts-1.b", "draft_pool_engines": 8})
    assert (config.draft_pool, config.draft_pool_engines) == ("drafts-1.b", 8)
    assert passed.keys() == {"num_speculative_tokens"}
    assert split_options({"placement": "ray"})[0].draft_pool is None
    assert SaguaroConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draft_pool": 3}, "draft_pool must be a name of letters, digits, '-', '_' and '.', not 3: write"),
        ({"draft_pool": ""}, 'and \'.\', not "": write for example "drafts"'),
        ({"draft_pool": "two words"}, 'not "two words": write'),
        ({"draft_pool": "x" * 65}, "draft_pool must be a name"),
        ({"draft_pool": "a", "placement": "process"}, 'draft_pool goes with placement "ray" alone, not "process"'),
        ({"draft_pool": "a", "placement": "inline"}, 'draft_pool goes with placement "ray" alone, not "inline"'),
        ({"draft_pool": "a", "draft_replicas": 2}, "draft_replicas is 2, but a draft_pool is one draft"),
        ({"draft_pool_engines": 8}, "draft_pool_engines is 8, but there is no draft_pool: name the pool too"),
        ({"draft_pool_engines": 0}, "draft_pool_engines is out of range: 0; write a number from 1 to 64"),
        ({"draft_pool_engines": 65}, "draft_pool_engines is out of range: 65"),
        ({"draft_pools": "a"}, 'unknown key "draft_pools" in the speculative config: did you mean "draft_pool"?'),
    ],
)
def test_what_is_no_draft_pool_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SaguaroConfigError) as found:
        split_options({"placement": "ray", **options})
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_ray_options_pass_through() -> None:
    options = {
        "num_cpus": 4,
        "num_gpus": 0.5,
        "resources": {"draft_node": 1, "nvme": 0.25},
        "runtime_env": {"env_vars": {"NAME": "value"}},
        "namespace": "ours",
        "address": "10.0.0.1:6379",
    }
    config, passed = split_options({"placement": "ray", "ray_options": options})
    assert config.ray_options == options
    assert "ray_options" not in passed
    assert SaguaroConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert split_options({"placement": "ray"})[0].ray_options is None
    assert split_options({"placement": "ray", "ray_options": {"num_gpus": 0}})[0].ray_options == {"num_gpus": 0}


@pytest.mark.parametrize(
    ("ray_options", "says"),
    [
        ([], "ray_options must be an object, not []: write for example"),
        ({"num_cpu": 1}, 'unknown key "num_cpu" in ray_options: did you mean "num_cpus"?'),
        ({"max_restarts": 3}, 'unknown key "max_restarts" in ray_options: write one of num_cpus, num_gpus, '),
        ({7: 3}, 'unknown key "7" in ray_options: write one of num_cpus, '),
        ({"num_cpus": 0}, "ray_options.num_cpus is out of range: 0; write a number of at least 1"),
        ({"num_cpus": 0.5}, "ray_options.num_cpus must be a whole number, not 0.5: write"),
        ({"num_cpus": True}, "ray_options.num_cpus must be a whole number, not True: write"),
        ({"num_gpus": -1}, "ray_options.num_gpus is out of range: -1; write a number of at least 0"),
        ({"num_gpus": "1"}, 'ray_options.num_gpus must be a number, not "1": write'),
        ({"num_gpus": float("inf")}, "ray_options.num_gpus is out of range: inf; write"),
        ({"num_gpus": float("nan")}, "ray_options.num_gpus is out of range: nan; write"),
        ({"resources": ["far"]}, "ray_options.resources must be an object of names and amounts, not ['far']: write"),
        ({"resources": {1: 1}}, "ray_options.resources must be an object of names and amounts, not {1: 1}: write"),
        ({"resources": {"far": 0}}, "ray_options.resources.far is out of range: 0; write a number above 0"),
        ({"resources": {"far": None}}, "ray_options.resources.far must be a number, not None: write"),
        ({"resources": {"GPU": 1}}, "ray_options.resources: GPU has a key of its own: write num_gpus"),
        ({"resources": {"CPU": 1}}, "ray_options.resources: CPU has a key of its own: write num_cpus"),
        ({"runtime_env": "env"}, 'ray_options.runtime_env must be an object of plain values, not "env": write'),
        (
            {"runtime_env": {"x": {1, 2}}},
            "ray_options.runtime_env must be an object of plain values, not {'x': {1, 2}}",
        ),
        ({"namespace": 3}, "ray_options.namespace must be a string, not 3: leave it out, or write one"),
        ({"address": " "}, 'ray_options.address must be a string, not " ": leave it out, or write one'),
        (
            {"address": "ray://h:1"},
            'ray_options.address "ray://h:1" is that of a Ray client server, which cannot place',
        ),
    ],
)
def test_ray_options_that_are_refused(ray_options: Any, says: str) -> None:
    assert refusal(placement="ray", ray_options=ray_options).startswith(says)


@pytest.mark.parametrize("placement", ["process", "inline"])
def test_ray_options_without_ray_are_refused(placement: str) -> None:
    assert refusal(placement=placement, ray_options={}).startswith('ray_options go with placement "ray" alone: write')
