from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.unit.kernels.interpreted import ROOT

KERNELS = {
    *("_probabilities", "_ranks", "_fork", "_copy", "_adopt", "_step", "_noise", "_settle", "_take", "_seal"),
    *("_agreed", "_copy_rows", "_copy_branches", "_gather", "_book"),
}


def compiled(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.compiled", *arguments],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    done = compiled(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found["sizes"]) == KERNELS
    assert min(found["sizes"].values()) > 1000
    # What another process writes
    assert set(found["past caches"]) == {"_copy_rows", "_copy_branches"}


def test_a_kernel_that_would_not_compile_is_found(tmp_path: Path) -> None:
    source = (ROOT / "vllm_saguaro" / "kernels" / "branch_step.py").read_text(encoding="utf-8")
    planted = tmp_path / "planted.py"
    planted.write_text(source.replace("BLOCK=_ROWS", "BLOCK=_ROWS - 1"), encoding="utf-8")
    done = compiled(tmp_path, str(planted))
    assert done.returncode != 0
    assert "power of 2" in done.stderr


def test_numbers_that_change_from_step_to_step_compile_nothing_anew() -> None:
    """Triton types a number by its value, and makes a constant of 1."""
    from vllm_saguaro.kernels import step_records

    changing = {p.name: (p.do_not_specialize, p.annotation_type) for p in step_records._seal.params}
    assert changing["rows"] == (True, "")
    assert changing["number"] == changing["head"] == (True, "i64")
