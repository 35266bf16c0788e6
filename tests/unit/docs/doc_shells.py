"""Runs a command of a page in a real shell, at the repository's root."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tests.e2e.harness import environment_at_start
from tests.unit.docs.doc_pages import ROOT
from tests.unit.docs.doc_shell import Shown
from tests.unit.docs.doc_ways import Runs, line_of

SECONDS = 1800.0
"""Any command is given up after this; on a quiet machine none takes a tenth of it."""
_QUESTIONS = [
    {"question_id": 1, "category": "translation", "turns": ["Translate to German: one two three"]},
    {"question_id": 2, "category": "qa", "turns": ["Who was that?"]},
]


def environment() -> dict[str, str]:
    """What a user's shell has after the installation: this Python's programs first, this checkout's package."""
    found = environment_at_start()
    programs = str(Path(sys.executable).parent)
    return found | {
        "PATH": f"{programs}{os.pathsep}{found.get('PATH', '')}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{found.get('PYTHONPATH', '')}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run(command: Shown, way: Runs, folder: Path, **servers: str) -> str:
    """Run it to its end, or until Ctrl-C; what it said. Raises AssertionError unless that is what it should say."""
    (folder / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in _QUESTIONS))
    line = line_of(command, way, folder=str(folder), **servers)
    where = copy_of_the_repository(folder / "copy") if way.elsewhere else ROOT
    with tempfile.TemporaryFile("w+") as said:
        process = begin(f"exec {line}" if way.interrupted else line, said, where)
        try:
            status = _interrupted(process, way, said) if way.interrupted else process.wait(SECONDS)
        finally:
            end(process)
        said.seek(0)
        text = said.read()
    expected = 130 if way.interrupted else 0
    assert status == expected, f"{line}\nended with {status}:\n{text[-6000:]}"
    assert re.search(way.says, text), f"{line}\nsays nothing like {way.says!r}:\n{text[-6000:]}"
    if way.repeats:
        shown = [each.rstrip() for each in command.output.strip().splitlines()]
        assert [each.rstrip() for each in text.strip().splitlines()] == shown, f"{command.place} shows another output"
    return text


def begin(line: str, said: IO[str], where: Path = ROOT) -> subprocess.Popen[str]:
    """A shell with this line, in a session of its own; what it says goes to `said`."""
    return subprocess.Popen(
        ["bash", "-c", line],
        cwd=where,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )


def copy_of_the_repository(folder: Path) -> Path:
    """What is installed of it: git's files of the package, without what was built beside them."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "vllm_saguaro", folder / "vllm_saguaro", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def end(process: subprocess.Popen[str]) -> None:
    """It and all that it started is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _hear_ctrl_c() -> None:
    """A test run in the background ignores it, and all that it starts would."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(process: subprocess.Popen[str], way: Runs, said: object) -> int:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
        if re.search(way.says, _so_far(said)):
            process.send_signal(signal.SIGINT)
            return process.wait(60)
    return process.wait(1)


def _so_far(said: object) -> str:
    descriptor = said.fileno()  # type: ignore[attr-defined]
    return os.pread(descriptor, 1 << 20, 0).decode("utf-8", "replace")
