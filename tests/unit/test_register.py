"""Installing the package changes nothing for those who do not ask for the method.

Each test looks at a fresh interpreter: what was loaded or wrapped before in this one would hide a difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

REPORT = """
import contextlib, io, json, sys

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name != "vllm" and not name.startswith("vllm."):
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}:{key}"] = id(value)
            if isinstance(value, type) and getattr(value, "__module__", "") == name:
                for part, member in list(vars(value).items()):
                    found[f"{name}:{key}.{part}"] = id(member)
    return found

IMPORTS
modules = set(sys.modules)
before = attributes()
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import vllm_saguaro
    vllm_saguaro.register()
    once = attributes()
    vllm_saguaro.register()
after = attributes()
print(json.dumps({
    "said": said.getvalue(),
    "imported": sorted(set(sys.modules) - modules),
    "changed": sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)),
    "changed_again": sorted(k for k in once.keys() | after.keys() if once.get(k) != after.get(k)),
    "looked_at": len(before),
}))
"""


def fresh_interpreter(imports: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.replace("IMPORTS", imports)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VLLM_PLUGINS": "no_plugin_at_all"},
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def foreign_modules(report: dict[str, Any]) -> list[str]:
    roots = {name.partition(".")[0] for name in report["imported"]}
    return sorted(roots - {"vllm_saguaro"} - set(sys.stdlib_module_names))


def test_where_vllm_is_not_loaded_nothing_happens() -> None:
    report = fresh_interpreter("")
    assert report["said"] == ""
    assert foreign_modules(report) == []
    assert [name for name in report["imported"] if name.startswith("vllm_saguaro")] == ["vllm_saguaro"]


def test_the_only_difference_is_two_doors_that_stay_when_called_again() -> None:
    report = fresh_interpreter("import vllm.engine.arg_utils")
    assert report["looked_at"] > 10_000
    assert report["said"] == ""
    assert report["changed"] == [
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    ]
    assert report["changed_again"] == []
    assert foreign_modules(report) == []


def test_a_vllm_without_the_functions_is_left_alone() -> None:
    from vllm_saguaro.vllm_hooks.engine_args import open_doors

    class EngineArgs:
        """Some other version's."""

    before = dict(vars(EngineArgs))
    open_doors(EngineArgs)
    assert dict(vars(EngineArgs)) == before
