"""Calls kernels under Triton's interpreter, in another process that is told what to run and sends back what came of it.

python interpreted.py      reads pickled calls from its input, writes pickled answers to its output
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vllm_saguaro.kernels.operations import TWINS

ROOT = Path(__file__).resolve().parents[3]
MODULES = {name: getattr(TWINS, name).__module__.rpartition(".")[2] for name in TWINS.__dataclass_fields__}
"""Where the kernel of each operation is: in a file that is called as its twin's."""


class Interpreted:
    """The process with the interpreter; a context manager that ends it."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )

    def __enter__(self) -> Interpreted:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def operation(self, name: str, source: Path | None = None) -> Callable[..., Any]:
        """A kernel as a function; of the file `source` instead of the package's."""

        def call(*arguments: Any) -> Any:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump((name, source, arguments), self._process.stdin)
            self._process.stdin.flush()
            error, result, changed = pickle.load(self._process.stdout)
            if error:
                raise RuntimeError(error)
            for mine, theirs in zip(arguments, changed, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
            return result

        return call


def _module(name: str, source: Path | None) -> ModuleType:
    if source is None:
        return importlib.import_module(f"vllm_saguaro.kernels.{MODULES[name]}")
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    while True:
        try:
            name, source, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = getattr(_module(name, source), name)(*arguments)
            answer: tuple[str, Any, Any] = ("", result, arguments)
        except Exception:
            answer = (traceback.format_exc(), None, None)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
