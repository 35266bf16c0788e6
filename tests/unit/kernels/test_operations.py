from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torch

from vllm_saguaro.kernels.operations import TWINS, operations_for

PACKAGE = Path(__file__).resolve().parents[3] / "vllm_saguaro"


def test_a_cpu_gets_the_twins() -> None:
    assert operations_for(torch.device("cpu")) is TWINS


def test_a_gpu_gets_kernels_with_the_names_of_the_twins() -> None:
    """In a process of its own: this one may be without the interpreter, and must stay without Triton."""
    check = (
        "import torch; from dataclasses import astuple; from vllm_saguaro.kernels.operations import *\n"
        "mine, yours = astuple(operations_for(torch.device('cuda'))), astuple(TWINS)\n"
        "assert [f.__name__ for f in mine] == [f.__name__ for f in yours]\n"
        "assert all(f.__module__.startswith('vllm_saguaro.kernels.') for f in mine)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent)


def test_nothing_imports_triton_until_a_gpu_needs_it() -> None:
    check = "import sys; from vllm_saguaro.kernels.operations import TWINS; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent)


def test_only_the_kernels_import_triton() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = [
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        ]
        if any(name.split(".")[0] == "triton" for name in names):
            assert path.parent.name == "kernels", f"{path.name} imports triton"
