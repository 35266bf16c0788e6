"""What Ray is asked to set aside for a draft, and what of it no node has free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray


def bundle_of(wanted: Mapping[str, Any]) -> dict[str, float]:
    """What must be free on one node for the draft that is `wanted` (`RayDraft`)."""
    bundle = {"CPU": float(wanted["num_cpus"]), **wanted["resources"]}
    if wanted["num_gpus"]:
        bundle["GPU"] = wanted["num_gpus"]
    return bundle


def lacking(bundle: Mapping[str, float]) -> str:
    """What of it the whole cluster has not; all of it where that is there, but on no single node."""
    free = ray.available_resources()
    missing = {name: amount for name, amount in bundle.items() if free.get(name, 0.0) < amount} or bundle
    return ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
