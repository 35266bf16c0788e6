"""The options where no outcome reaches the host: what is different there, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError, split_options
from vllm_saguaro.device_options import on_device, on_host


def on_v2(**written: Any) -> SaguaroConfig:
    return on_device(split_options(written)[0], written)


def refusal(where: Any, **written: Any) -> str:
    with pytest.raises(SaguaroConfigError) as caught:
        where(split_options(written)[0], written)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_on_a_device() -> None:
    config = on_v2()
    assert config == SaguaroConfig(placement="stream", backup="none", adaptive=False)
    assert config.draft_sample_method == "coupled"
    assert not config.chooses_itself


def test_what_is_written_stays() -> None:
    config = on_v2(
        placement="process", backup="none", adaptive=False, draft_sample_method="greedy", branches=8, draft_cpus="1"
    )
    assert (config.placement, config.draft_sample_method, config.branches) == ("process", "greedy", 8)
    assert on_v2(draft_gpu_memory=1.5).draft_gpu_memory == 1.5
    assert on_v2(placement="ray").placement == "ray"


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ({"placement": "inline"}, 'placement "inline" needs each outcome on the host'),
        ({"backup": "ngram"}, 'backup "ngram" needs each outcome on the host'),
        ({"backup": "jit"}, 'backup "jit" needs each outcome on the host'),
        ({"adaptive": True}, "adaptive true needs each outcome on the host"),
        ({"draft_replicas": 2}, "draft_replicas is 2, model runner V2 has one draft"),
        ({"draft_cpus": "1"}, 'draft_cpus with placement "stream"'),
        ({"fan_out": "uniform"}, 'fan_out "uniform" with placement "stream"'),
        ({"draft_gpu_memory": 1, "placement": "process"}, 'draft_gpu_memory goes with placement "stream" alone'),
    ],
)
def test_what_a_device_cannot_have(written: dict[str, Any], line: str) -> None:
    assert refusal(on_device, **written).startswith(line)


@pytest.mark.parametrize("amount", [0, -1, "much", True, float("inf")])
def test_memory_is_an_amount(amount: Any) -> None:
    with pytest.raises(SaguaroConfigError, match=r"^draft_gpu_memory "):
        split_options({"draft_gpu_memory": amount})


def test_a_stream_needs_a_device() -> None:
    assert refusal(on_host, placement="stream").startswith('placement "stream" drafts on a GPU with model runner V2')
    assert refusal(on_host, draft_gpu_memory=1).startswith('draft_gpu_memory goes with placement "stream" alone')
    config, written = split_options({"backup": "jit"})
    assert on_host(config, written) is config
