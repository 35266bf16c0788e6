"""A draft engine that is broken on purpose: what a test of acceptance must be able to see."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

from vllm_saguaro.drafting import engine
from vllm_saguaro.drafting.kv import BranchSpan, branch_span


@contextlib.contextmanager
def sabotaged(how: str | None) -> Iterator[None]:
    """While this lasts, draft engines in this process are broken: "no_copy", "wrong_branch", or (None) not at all."""
    with contextlib.ExitStack() as stack:
        if how == "no_copy":
            stack.enter_context(mock.patch.object(engine, "branch_span", _never_copies))
        elif how == "wrong_branch":
            stack.enter_context(
                mock.patch.object(engine.DraftEngine, "_matching", _neighbour(engine.DraftEngine._matching))
            )
        elif how is not None:
            raise ValueError(f"no sabotage is called {how!r}")
        yield


def _never_copies(position: int, steps: int, block_size: int) -> BranchSpan:
    """A branch's first block holds nothing of the request's text."""
    return dataclasses.replace(branch_span(position, steps, block_size), copies=False)


def _neighbour(matching: Any) -> Any:
    """On a hit the right drafts are adopted, with another branch's KV."""

    def swapped(self: Any, trunk: Any, *others: Any) -> Any:
        branch = matching(self, trunk, *others)
        if branch is not None:
            for other in trunk.branches:
                if other is not branch and (other.first, len(other.blocks)) == (branch.first, len(branch.blocks)):
                    branch.blocks, other.blocks = other.blocks, branch.blocks
                    break
        return branch

    return swapped
