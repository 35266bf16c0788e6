"""Which placements of a draft a machine allows, by its cores, its GPUs and its Ray; and how to have the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from vllm_saguaro.cli.finding import Finding, error, ok, refused

_ON_ITS_CORE: Final = "on the target's only core"


@dataclass(frozen=True, slots=True)
class Host:
    """What vLLM would run on: the CPU or CUDA, with model runner V1 or V2. `gpus`: what it sees of them on CUDA."""

    on_cpu: bool
    on_v2: bool
    gpus: int = 0

    @property
    def lacks_gpu(self) -> bool:
        """Whether there is none beside the target's, for a draft that is not on the target's."""
        return not self.on_cpu and self.gpus < 2


@dataclass(frozen=True, slots=True)
class RayHere:
    """`version`: of the Ray that is installed; `problem`: the refusal of a start that asks for it, empty if there is
    none."""

    version: str | None
    problem: str = ""


@dataclass
class _Sorted:
    """What a draft can have here, with remarks; what it cannot, with reasons; what would change that."""

    allowed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    cures: list[str] = field(default_factory=list)


def placements(host: Host, cores: int, ray: RayHere) -> Finding:
    """Where a draft could run. `cores`: that this process may use, one thread of each."""
    if not host.on_cpu and not host.gpus:
        return error(
            "placement",
            "none: this vLLM computes on a GPU, and this process sees none",
            "make one visible (CUDA_VISIBLE_DEVICES, the container's --gpus), or install vLLM for the CPU",
        )
    found = _Sorted()
    if host.on_v2:
        found.allowed.append("stream")
    if not host.lacks_gpu:
        found.allowed.append(_with_remarks("process", _share_of_gpus(host), _ON_ITS_CORE if cores < 2 else ""))
        if not host.on_v2:
            found.allowed.append("inline")
        _sort_ray(found, host, cores, ray)
    else:
        found.refused.append("process, ray (they need a GPU beside the target's, and this process sees 1)")
        found.cures.append(
            'stream is the default; for "placement": "process" make another GPU visible (CUDA_VISIBLE_DEVICES, the '
            "container's --gpus)"
        )
    text = ", ".join(found.allowed) + (f"; not {', '.join(found.refused)}" if found.refused else "")
    return ok("placement", text, "; ".join(found.cures))


def _sort_ray(found: _Sorted, host: Host, cores: int, ray: RayHere) -> None:
    if ray.problem:
        problem = refused("placement", ray.problem)
        found.refused.append(f"ray ({problem.text})")
        found.cures.append(f"for ray: {problem.advice}")
        return
    shares = f"{_ON_ITS_CORE}, if no other node of its cluster has one" if cores < 2 and host.on_cpu else ""
    found.allowed.append(_with_remarks("ray", f"Ray {ray.version}", _share_of_gpus(host), shares))


def _share_of_gpus(host: Host) -> str:
    """How many GPUs are left to the target."""
    return "" if host.on_cpu else f"on a GPU of its own, beside a target on up to {host.gpus - 1}"


def _with_remarks(name: str, *remarks: str) -> str:
    said = "; ".join(filter(None, remarks))
    return f"{name} ({said})" if said else name
