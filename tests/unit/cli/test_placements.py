"""Which placements made-up machines allow, and what is said of the others."""

from __future__ import annotations

import pytest

from vllm_saguaro.cli.finding import Level
from vllm_saguaro.cli.placements import Host, RayHere, placements

V1, V2_ON_CPU = Host(on_cpu=True, on_v2=False), Host(on_cpu=True, on_v2=True)
RAY = RayHere("2.60.0")
NO_RAY = RayHere(None, 'placement "ray" needs Ray, which is not here: pip install ray, or write "placement": "process"')


def on_cuda(gpus: int) -> Host:
    return Host(on_cpu=False, on_v2=True, gpus=gpus)


@pytest.mark.parametrize(
    ("host", "cores", "text"),
    [
        (V1, 2, "process, inline, ray (Ray 2.60.0)"),
        (V1, 64, "process, inline, ray (Ray 2.60.0)"),
        (
            V1,
            1,
            "process (on the target's only core), inline, "
            "ray (Ray 2.60.0; on the target's only core, if no other node of its cluster has one)",
        ),
        (V2_ON_CPU, 2, "stream, process, ray (Ray 2.60.0)"),
        (
            on_cuda(2),
            8,
            "stream, process (on a GPU of its own, beside a target on up to 1), "
            "ray (Ray 2.60.0; on a GPU of its own, beside a target on up to 1)",
        ),
        (
            on_cuda(4),
            1,
            "stream, process (on a GPU of its own, beside a target on up to 3; on the target's only core), "
            "ray (Ray 2.60.0; on a GPU of its own, beside a target on up to 3)",
        ),
    ],
)
def test_a_machine_that_allows_all_needs_no_advice(host: Host, cores: int, text: str) -> None:
    found = placements(host, cores, RAY)
    assert (found.level, found.text, found.advice) == (Level.OK, text, "")


@pytest.mark.parametrize("ray", [RAY, NO_RAY])
def test_with_one_gpu_the_draft_is_on_a_stream_of_it(ray: RayHere) -> None:
    found = placements(on_cuda(1), 8, ray)
    assert found.level is Level.OK
    assert found.text == "stream; not process, ray (they need a GPU beside the target's, and this process sees 1)"
    assert "make another GPU visible" in found.advice


def test_without_a_gpu_a_vllm_for_cuda_does_not_run() -> None:
    found = placements(on_cuda(0), 8, RAY)
    assert found.level is Level.ERROR
    assert "sees none" in found.text
    assert "CUDA_VISIBLE_DEVICES" in found.advice


@pytest.mark.parametrize(("host", "others"), [(V1, "process, inline"), (V2_ON_CPU, "stream, process")])
def test_without_ray_it_says_how_to_have_it(host: Host, others: str) -> None:
    found = placements(host, 2, NO_RAY)
    assert found.level is Level.OK
    assert found.text == f'{others}; not ray (placement "ray" needs Ray, which is not here)'
    assert found.advice == 'for ray: pip install ray, or write "placement": "process"'
