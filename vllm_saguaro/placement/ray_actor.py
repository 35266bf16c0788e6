"""The Ray actor that holds the draft side. Nothing heavy is imported before its process is on its cores."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any


class DraftActor:
    """Ray places it, starts it, and says when it has died. Drafting is one call, as long as the target lives."""

    def whereabouts(self) -> tuple[str, int]:
        """Ray's id of the node, and the process id there."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def serve(self, module: str, start: Mapping[str, Any], variables: Mapping[str, str], niceness: int) -> str:
        """Draft for the target side that `start` invites to; how that ended.

        `variables`: added to this process's environment, where they are not there already. `niceness`: the target's.
        Ray gives its workers a far higher one, with which a draft on a busy machine would hardly ever be in time.
        """
        with contextlib.suppress(OSError):  # on another node, or as another user, it may not be ours to lower
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        return str(importlib.import_module(module).serve_invited(start))
