"""Deepened copies of the pair, made once and kept in the temporary folder."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path


def deepened(source: Path, layers: int | None) -> Path:
    """The folder of `source` with `layers` layers: `source` itself for None, else a copy that is made if it is missing.

    A copy is known by what it was made from (files, sizes, times) and by the code that made it.
    """
    if layers is None:
        return source
    from vllm_saguaro.benchmark import deepen  # imports torch

    made_from = [(str(path), path.stat()) for path in sorted(source.iterdir()) if path.is_file()]
    made_from.append(("", Path(deepen.__file__).stat()))
    key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in made_from])
    name = f"saguaro-deepened-{hashlib.sha256(key.encode()).hexdigest()[:12]}-L{layers}"
    folder = Path(tempfile.gettempdir()) / name
    if not (folder / "config.json").is_file():
        work = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        deepen.deepen(source, work, layers)
        try:
            work.rename(folder)  # all or nothing: a half-written model would load
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder
