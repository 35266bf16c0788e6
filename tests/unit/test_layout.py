"""The rules of docs/design.md, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_saguaro"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT: dict[str, set[str]] = {
    "messages": set(),
    "cores": set(),
    "config_checks": {"cores"},
    "config": {"config_checks"},
    "tuned": {"config", "algorithm"},
    "counters": {"messages"},
    "algorithm": {"messages"},
    "kernels": {"algorithm"},
    "device_messages": {"messages"},
    "drafting": {"algorithm", "messages", "kernels", "device_messages"},
    "placement": {"drafting", "messages", "counters", "device_messages"},
    "simulation": {"algorithm", "drafting"},
    "policy": {"algorithm", "messages", "counters"},
    "turn": {"policy", "messages"},
    "slots": {"placement", "messages"},
    "trace_file": {"config"},
    "trace": {"trace_file", "turn", "placement", "messages", "counters"},
    "backups": {"turn", "trace", "policy", "placement", "messages", "counters"},
    "speculator": {"slots", "backups", "turn", "trace", "policy", "placement", "messages", "counters"},
    "device_options": {"config"},
}
"""What each room may import beside itself; `vllm_hooks`, `cli`, `benchmark` and `tuning` may import
everything."""
LIGHT = (
    "__init__.py",
    "config.py",
    "config_checks.py",
    "device_options.py",
    "cores.py",
    "messages.py",
    "counters.py",
    "trace_file.py",
)
UNPICKLING = (
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
    "multiprocessing",
)
"""`multiprocessing` sends pickles through its pipes, queues and managers."""
EVALUATING = ("eval", "exec", "compile", "__import__")
LOADING = ("torch", "np", "numpy", "yaml", "joblib")
"""Whose `load` may unpickle."""
HEAVY = ("torch", "vllm", "transformers", "ray")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def of_package(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_hooks_import_vllm(path: Path) -> None:
    if room_of(path) not in ("vllm_hooks", "cli", "benchmark"):
        assert [module for module in imported(path) if of_package(module, "vllm")] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("vllm_hooks", "cli", "benchmark", "tuning", "__init__"):
        return
    assert room in MAY_IMPORT, f"a new room {room}: say in docs/design.md and here what it may import"
    ours = {module.split(".")[1] for module in imported(path) if of_package(module, "vllm_saguaro")}
    assert ours - {room} <= MAY_IMPORT[room]


def test_no_room_imports_itself_in_a_circle() -> None:
    for room, below in MAY_IMPORT.items():
        reached, waiting = set[str](), list(below)
        while waiting:
            reached.add(waiting[-1])
            waiting += MAY_IMPORT[waiting.pop()] - reached
        assert room not in reached


def test_what_every_vllm_process_imports_is_light() -> None:
    for path in (PACKAGE / name for name in LIGHT):
        assert [m for m in imported(path) if any(of_package(m, heavy) for heavy in HEAVY)] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_file_is_named_for_nothing(path: Path) -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not vague & {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_bytes_become_code_or_objects(path: Path) -> None:
    """Nothing is unpickled, and nothing evaluated: see docs/security.md."""
    assert [module for module in imported(path) if any(of_package(module, unsafe) for unsafe in UNPICKLING)] == []
    calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert [f.lineno for f in calls if isinstance(f, ast.Name) and f.id in EVALUATING] == []
    loads = [f for f in calls if isinstance(f, ast.Attribute) and f.attr == "load" and isinstance(f.value, ast.Name)]
    assert [f.lineno for f in loads if isinstance(f.value, ast.Name) and f.value.id in LOADING] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import multiprocessing.connection",
        "def f():\n    import marshal",
        "eval('1')",
        "torch.load('x')",
    ],
)
def test_what_makes_objects_of_bytes_would_be_noticed(line: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line)
    with pytest.raises(AssertionError):
        test_no_bytes_become_code_or_objects(path)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_printed(path: Path) -> None:
    if room_of(path) == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []
