"""How branches share the KV blocks of a request, by the functions that give them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.illustrations.canvas import DRAFT, QUIET, TARGET, box, new_drawing, save
from vllm_saguaro.drafting.kv import BranchSpan, blocks_for, branch_span

BLOCK = 4
"""Tokens a block in the picture; 32 on a CPU."""
TEXT = 10
K = 4
SHOWN = (0, 2, 4)
"""Accepted drafts k of the outcomes that are drawn."""
HIT = 2
_SIZE = 0.8
_LEFT = 3.1


def span_of(accepted: int) -> BranchSpan:
    """The private blocks of the branch for an outcome with so many accepted drafts.

    Its first token, t*, stands after the text and the accepted drafts; the last draft needs no KV yet.
    """
    return branch_span(TEXT + accepted, K, BLOCK)


def cells(accepted: int) -> list[str]:
    """What is at each position of the branch's row of blocks: "shared", "copied", "own", or "" (not written)."""
    span = span_of(accepted)
    found = ["shared"] * (span.first * BLOCK)
    found += ["copied"] * (TEXT + accepted - len(found)) + ["own"] * K
    return found + [""] * ((span.first + span.count) * BLOCK - len(found))


def draw_branches(path: Path) -> Path:
    """The request's own row, some branches, and what is the request's after one of them was hit."""
    width = blocks_for(TEXT + 2 * K, BLOCK) * BLOCK
    figure, axes = new_drawing(10.5, 4.6, _LEFT + width * _SIZE + 0.3, 8.2)
    trunk = ["text"] * TEXT + ["draft"] * K
    trunk += [""] * (blocks_for(len(trunk), BLOCK) * BLOCK - len(trunk))
    labels = [f"{number + 1}" for number in range(TEXT)] + [f"x{number + 1}" for number in range(K)]
    _row(axes, 6.9, "the request, and the\ndrafts under verification", trunk, labels)
    for place, accepted in enumerate(SHOWN):
        names = ["t*", *(f"y{number + 1}" for number in range(K - 1))]
        labels = [""] * (TEXT + accepted) + names
        _row(axes, 5.3 - 1.3 * place, f"branch of k = {accepted}", cells(accepted), labels)
    after = ["text"] * (TEXT + HIT + 1) + ["draft"] * (K - 1)
    after += [""] * (blocks_for(len(after), BLOCK) * BLOCK - len(after))
    labels = [f"{number + 1}" for number in range(TEXT)] + ["x1", "x2", "t*", "y1", "y2", "y3"]
    own = span_of(HIT).first
    _row(axes, 0.9, f"after a hit with k = {HIT}:\nno KV has moved", after, labels, owned_from=own)
    legend = ((TARGET, "", "text"), (DRAFT, "", "drafts, and the branch's own"), (QUIET, "", "shared: the same block"))
    at = _LEFT
    for colour, hatch, name in (*legend, ("white", "////", "copied, because the branch starts inside a block")):
        box(axes, at, 0.05, 0.45, 0.4, colour, hatch=hatch)
        axes.text(at + 0.6, 0.25, name, fontsize=7.5, va="center")
        at += 1.3 + 0.135 * len(name)
    return save(figure, path)


def _row(axes: Any, bottom: float, name: str, kinds: list[str], labels: list[str], owned_from: int = 10**9) -> None:
    """One row of blocks; from block `owned_from` on with a heavy frame: those that a branch has brought."""
    axes.text(_LEFT - 0.2, bottom + _SIZE / 2, name, ha="right", va="center", fontsize=8.5)
    colours = {"text": TARGET, "draft": DRAFT, "own": DRAFT, "shared": QUIET, "copied": "white", "": "white"}
    for position, kind in enumerate(kinds):
        left = _LEFT + position * _SIZE
        box(axes, left, bottom, _SIZE, _SIZE, colours[kind], edgecolor="0.75", hatch="////" * (kind == "copied"))
        if position < len(labels):
            axes.text(left + _SIZE / 2, bottom + _SIZE / 2, labels[position], ha="center", va="center", fontsize=8)
    for block in range(len(kinds) // BLOCK):
        shared = kinds[block * BLOCK] == "shared"
        frame = {"fill": False, "linewidth": 2.4 if block >= owned_from else 1.2, "linestyle": ":" if shared else "-"}
        box(axes, _LEFT + block * BLOCK * _SIZE, bottom, BLOCK * _SIZE, _SIZE, "none", edgecolor="black", **frame)
