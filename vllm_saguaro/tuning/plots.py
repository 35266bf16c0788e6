"""The picture of a tuning run. Needs matplotlib, which is imported here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_saguaro.tuning.candidates import SAGUARO, Tried
from vllm_saguaro.tuning.found import Tuning

_COLOURS = {"plain": "0.5", "draft_model": "tab:orange"}


def plot(found: Tuning, path: Path) -> None:
    """A panel a load: tokens a second by K, predicted as a line for each N, measured as points.

    What differs in more than K is drawn hollow (unless it was chosen) and a little to the right of its K.
    Raises ImportError without matplotlib, and OSError where the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = found.settings.loads
    columns = len(found.settings.temperatures)
    rows = len(found.settings.batches)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1 + 4.2 * columns, 1.2 + 3 * rows), layout="constrained", squeeze=False
    )
    for panel, load in zip(axes.flat, loads, strict=True):
        _predicted(panel, found, load)
        _measured(panel, found, load)
        panel.set_title(f"{load[0]} at once, T={load[1]:g}", fontsize=9)
        panel.set_xlabel("K, drafts a round")
        panel.set_ylabel("tokens/s")
        panel.set_xticks(sorted({0, *found.settings.ks}))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    title = f"{Path(found.settings.target).name}: lines predicted (without backups), points measured"
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _predicted(panel: Any, found: Tuning, load: tuple[int, float]) -> None:
    for number, n in enumerate(sorted({n for _, n in found.predicted})):
        line = [(k, speeds[load]) for (k, size), speeds in sorted(found.predicted.items()) if size == n]
        panel.plot(*zip(*line, strict=True), color=f"C{number}", linewidth=1, label=f"N = {n}, predicted")


def _measured(panel: Any, found: Tuning, load: tuple[int, float]) -> None:
    named = set[str]()
    changed = 0
    for each in found.tried:
        method = each.candidate.method
        low, high = each.spread[load]
        speed = each.speeds[load]
        place, name = float(_k(each)), f"{method}, measured"
        is_chosen, is_changed = each is found.chosen, _is_changed(each)
        if is_changed:  # mostly of one K: side by side, or they would hide each other
            changed += 1
            place += 0.1 * changed
            name = f"{method} with another N, backup, placement or q, measured"
        if is_chosen:
            name = "chosen, measured"
        panel.errorbar(
            [place],
            [speed],
            yerr=[[speed - low], [high - speed]],
            marker="*" if is_chosen else "o",
            markersize=11 if is_chosen else 5,
            markerfacecolor="white" if is_changed and not is_chosen else None,
            color=_COLOURS.get(method, "black"),
            capsize=2,
            linestyle="",
            label=name if name not in named else None,
        )
        named.add(name)


def _is_changed(each: Tried) -> bool:
    return each.candidate.method == SAGUARO and bool(each.candidate.keys.keys() - {"num_speculative_tokens"})


def _k(each: Tried) -> int:
    return int(each.candidate.keys.get("num_speculative_tokens", 4 if each.candidate.method == SAGUARO else 0))
