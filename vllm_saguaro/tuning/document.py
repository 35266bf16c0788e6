"""The file that `"tuned": FILE` takes: the choice, what an engine begins with, and all that both come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_saguaro.tuned import FORMAT, KIND, MadeFor
from vllm_saguaro.tuning import prediction
from vllm_saguaro.tuning.candidates import Load, Speeds, Tried, choice_of, gain
from vllm_saguaro.tuning.found import Tuning


def document(found: Tuning, made_for: MadeFor, provenance: Mapping[str, Any], draft_is_own: bool) -> dict[str, Any]:
    """Plain values only. `draft_is_own`: the draft that a start would choose by itself, and need not be named."""
    settings, chosen = found.settings, found.chosen
    named = {} if draft_is_own else {"model": _from_anywhere(settings.draft)}
    return {
        "kind": KIND,
        "format": FORMAT,
        "recommended": found.recommended,
        "choice": named | choice_of(chosen.candidate, settings.fixed),
        "gain_over_plain": {each.candidate.name: round(gain(each.speeds, found.plain), 3) for each in found.tried},
        "by_batch": [_of_batch(found, batch) for batch in settings.batches],
        "priors": prediction.priors_of(list(found.worlds.values())).to_dict() if found.worlds else None,
        "made_for": made_for.to_dict(),
        "measured": [_tried(each, found.plain) for each in found.tried],
        "predicted": [
            {"k": k, "branches": n, "tokens_per_second": _by_load(speeds)}
            for (k, n), speeds in sorted(found.predicted.items())
        ],
        "worlds": {f"{temperature:g}": world.to_json() for temperature, world in found.worlds.items()},
        "observations": [
            {"batch": batch, "temperature": temperature, **seen.to_json()}
            for (batch, temperature), seen in found.observations.items()
        ],
        "left_out": found.left_out,
        "notes": found.notes,
        "seconds": round(found.seconds, 1),
        "settings": {
            "words": list(settings.words),
            "fixed": dict(settings.fixed),
            "batches": list(settings.batches),
            "temperatures": list(settings.temperatures),
            "k": list(settings.ks),
            "tokens": settings.tokens,
            "repetitions": settings.repetitions,
        },
        "provenance": dict(provenance),
    }


def write(data: Mapping[str, Any], path: Path) -> None:
    """As JSON that a person can read. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(found: Tuning) -> str:
    """Tokens a second: a line an engine, a column a load, and last how many times plain over all of them."""
    loads = found.settings.loads
    heads = [f"{batch} at T={temperature:g}" for batch, temperature in loads]
    wide = max(len(each.candidate.name) for each in found.tried)
    lines = [f"{'tokens/s, requests at once':<{wide}} " + " ".join(f"{head:>10}" for head in heads) + "   / plain"]
    for each in found.tried:
        speeds = " ".join(f"{each.speeds[load]:>10.1f}" for load in loads)
        mark = "  <- chosen" if each is found.chosen else ""
        lines.append(f"{each.candidate.name:<{wide}} {speeds} {gain(each.speeds, found.plain):>9.2f}{mark}")
    return "\n".join(lines)


def _from_anywhere(model: str) -> str:
    """A folder's whole path: a server may be started elsewhere. A hub name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _of_batch(found: Tuning, batch: int) -> dict[str, Any]:
    """What was fastest at this batch, measured and predicted."""
    gains = {each.candidate.name: gain(_at(each.speeds, batch), found.plain) for each in found.tried}
    predicted = {pair: gain(_at(speeds, batch), found.plain) for pair, speeds in found.predicted.items()}
    best = max(predicted, key=lambda pair: predicted[pair]) if predicted else None
    return {
        "batch": batch,
        "gain_over_plain": {name: round(value, 3) for name, value in gains.items()},
        "fastest": max(gains, key=lambda name: gains[name]),
        "predicted_best": {"k": best[0], "branches": best[1]} if best else None,
    }


def _at(speeds: Speeds, batch: int) -> dict[Load, float]:
    return {load: speed for load, speed in speeds.items() if load[0] == batch}


def _tried(each: Tried, plain: Speeds) -> dict[str, Any]:
    return {
        "name": each.candidate.name,
        "method": each.candidate.method,
        "keys": dict(each.candidate.keys),
        "gain_over_plain": round(gain(each.speeds, plain), 3),
        "tokens_per_second": [
            {**line, "lowest": round(each.spread[load][0], 2), "highest": round(each.spread[load][1], 2)}
            for line, load in zip(_by_load(each.speeds), each.speeds, strict=True)
        ],
    }


def _by_load(speeds: Speeds) -> list[dict[str, Any]]:
    return [
        {"batch": batch, "temperature": temperature, "value": round(value, 2)}
        for (batch, temperature), value in speeds.items()
    ]
