"""Which placements `tune` tries on made-up machines, and what it says of the others."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_saguaro.cli.other_placements import other_placements
from vllm_saguaro.cli.placements import Host
from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.vllm_hooks import compatibility

V1, V2_ON_CPU = Host(on_cpu=True, on_v2=False), Host(on_cpu=True, on_v2=True)
CLUSTER = "10.0.0.1:6379"


@pytest.fixture(autouse=True)
def ray_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is."""
    monkeypatch.setattr(compatibility, "check_placement", lambda placement: None)


def on_cuda(gpus: int) -> Host:
    return Host(on_cpu=False, on_v2=True, gpus=gpus)


@pytest.mark.parametrize(
    ("host", "usual", "cluster", "tried"),
    [
        (V1, "process", None, ("inline",)),
        (V1, "process", "", ("inline",)),
        (V1, "process", CLUSTER, ("inline", "ray")),
        (V1, "process", "auto", ("inline", "ray")),
        (V1, "process", "ray://head:10001", ("inline",)),
        (V2_ON_CPU, "stream", CLUSTER, ("process",)),
        (on_cuda(1), "stream", CLUSTER, ()),
        (on_cuda(2), "stream", CLUSTER, ("process",)),
    ],
)
def test_what_the_machine_allows_is_tried(host: Host, usual: str, cluster: str | None, tried: tuple[str, ...]) -> None:
    placements, left_out = other_placements(host, usual, {}, cluster)
    assert placements == tried
    assert {usual, *placements, *left_out} == {"process", "stream", "inline", "ray"}
    assert not set(placements) & set(left_out)


def test_the_reasons_are_short() -> None:
    _, left_out = other_placements(V1, "process", {}, None)
    assert left_out == {
        "stream": "drafts on a GPU with model runner V2, this is vLLM's CPU backend with runner V1",
        "ray": "is on one machine what process is, and RAY_ADDRESS names no cluster",
    }
    _, left_out = other_placements(on_cuda(1), "stream", {}, None)
    assert left_out == {
        "process": "needs a GPU beside the target's, and this process sees 1",
        "inline": "needs each outcome on the host, which model runner V2 does not have",
        "ray": "needs a GPU beside the target's, and this process sees 1",
    }
    assert "process does the same" in other_placements(on_cuda(2), "stream", {}, CLUSTER)[1]["ray"]
    assert "Ray client server" in other_placements(V1, "process", {}, "ray://head:10001")[1]["ray"]


def test_without_ray_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(placement: str) -> None:
        if placement == "ray":
            raise SaguaroConfigError('placement "ray" needs Ray, which is not installed here: pip install ray')

    monkeypatch.setattr(compatibility, "check_placement", missing)
    placements, left_out = other_placements(V1, "process", {}, CLUSTER)
    assert placements == ("inline",)
    assert left_out["ray"] == "needs Ray, which is not installed here"


@pytest.mark.parametrize(
    ("host", "usual", "fixed", "refused"),
    [
        (V1, "process", {"draft_replicas": 2}, {"inline": "draft_replicas is 2"}),
        (on_cuda(2), "stream", {"draft_gpu_memory": 1.0}, {"process": "draft_gpu_memory goes with"}),
    ],
)
def test_what_a_start_refuses_with_the_users_keys_is_not_tried(
    host: Host, usual: str, fixed: dict[str, Any], refused: dict[str, str]
) -> None:
    placements, left_out = other_placements(host, usual, fixed, None)
    assert placements == ()
    for name, why in refused.items():
        assert left_out[name].startswith(why)


def test_the_users_placement_is_not_spoken_of() -> None:
    assert other_placements(V1, "process", {"placement": "process"}, CLUSTER) == ((), {})
