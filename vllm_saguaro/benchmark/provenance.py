"""Where numbers come from: revision, versions, processor, command, and who else was using the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark.checkout import CHECKOUT
from vllm_saguaro.benchmark.procfs import busy_share
from vllm_saguaro.benchmark.settings import allowed_cores

PACKAGES = ("torch", "vllm", "transformers", "vllm-saguaro")

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""Processor flags that decide how fast which type is."""

COMMAND = ("vllm-saguaro", "__main__.py")
"""What the first word ends in where it is the package's command, wherever that is installed."""

BUSY = 0.05
"""A share of the cores' time beyond which somebody else's work would be seen in the numbers."""


def collect(cores: Iterable[int], arguments: list[str] | None = None) -> dict[str, Any]:
    """All of it; takes a second, in which the machine is watched. Call it before anything is started."""
    cores = sorted(cores)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv if arguments is None else arguments),
        "git": git_state(),
        "versions": versions(),
        "processor": processor(),
        "cores_used": cores,
        "cores_allowed": list(allowed_cores()),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "busy_before": round(busy_share(cores), 3),
    }


def command(arguments: list[str]) -> str:
    """As it was typed, the project's folder left out of paths."""
    if CHECKOUT is not None:
        arguments = [argument.replace(f"{CHECKOUT}/", "") for argument in arguments]
    program = Path(arguments[0]).name if arguments else ""
    if program in COMMAND:
        return shlex.join(["vllm-saguaro", *arguments[1:]])
    return "python " + shlex.join(arguments)


def git_state() -> dict[str, Any]:
    """The revision, and whether the files are those of the revision; None where git does not know."""
    revision = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {"revision": revision, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    if CHECKOUT is None:
        return None
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor(cpuinfo: str | None = None) -> dict[str, Any]:
    """Model, number of cores and flags of interest, from /proc/cpuinfo."""
    if cpuinfo is None:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name", platform.machine()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def warnings(provenance: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know about the state of the machine before they were taken."""
    busy = provenance["busy_before"]
    if busy <= BUSY:
        return []
    cores = ", ".join(map(str, provenance["cores_used"]))
    return [f"other processes used {busy:.0%} of core {cores} before the start: the times will be too long"]
