"""What `vllm-saguaro tune` wrote, taken into a speculative config: `"tuned": FILE`.

The file's choice fills in the keys that the user has not written; its measurements are what the run-time choices begin
with. Standard library only. A file that is none is refused with one line; one that was made for something else is used,
and said to be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.config import SaguaroConfigError, split_options

KIND: Final = "vllm-saguaro tuned"
FORMAT: Final = 1
CHOICE_KEYS: Final = (
    "model",
    "num_speculative_tokens",
    "branches",
    "backup",
    "placement",
    "draft_sample_method",
    "sampling_c",
)
"""What a choice may have."""
SELF: Final = "saguaro"

_CURE: Final = "write the path of a file that vllm-saguaro tune wrote"


@dataclass(frozen=True)
class MadeFor:
    """What a file was measured with, or what is to be served: any difference makes the measurements doubtful.

    A model is its name and a digest of its `config.json`, None where that is not on this machine.
    """

    target: tuple[str, str | None]
    draft: tuple[str, str | None]
    dtype: str
    vllm: str
    machine: str

    def differences(self, here: MadeFor) -> list[str]:
        """Each difference in words: what it was measured with, and what is here."""
        found = []
        for name in ("target", "draft"):
            (own, own_digest), (other, other_digest) = getattr(self, name), getattr(here, name)
            if (own_digest != other_digest) if own_digest and other_digest else (own != other):
                found.append(f"{name} {own}, here {other}")
        for name in ("dtype", "vllm", "machine"):
            if getattr(self, name) != getattr(here, name):
                found.append(f"{name} {getattr(self, name)}, here {getattr(here, name)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "target": list(self.target),
            "draft": list(self.draft),
            "dtype": self.dtype,
            "vllm": self.vllm,
            "machine": self.machine,
        }


@dataclass(frozen=True)
class Tuned:
    """A tuned file that was read: keys of a speculative config, and what is believed at the start.

    `recommended`: "saguaro", or what was faster: "plain", "draft_model".
    """

    path: str
    choice: Mapping[str, Any]
    priors: Priors | None
    made_for: MadeFor
    recommended: str

    def fill_in(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """What the user wrote, and the choice where he wrote nothing."""
        return {**self.own(written), **{key: value for key, value in written.items() if value is not None}}

    def own(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the choice that are used: those that the user has not written."""
        return {key: value for key, value in self.choice.items() if written.get(key) is None}

    def doubts(self, here: MadeFor) -> str | None:
        """One line of warning where the file was made for something else, or found something else faster."""
        lines = []
        if differences := self.made_for.differences(here):
            lines.append(f"it was measured with {'; '.join(differences)}: its choice may be wrong here")
        if self.recommended != SELF:
            name = {"plain": "plain vLLM"}.get(self.recommended, f'method "{self.recommended}"')
            lines.append(f"when it was measured {name} was faster than saguaro")
        return "; ".join(lines) or None


def read(path: str) -> Tuned:
    """A tuned file. Raises SaguaroConfigError with one line for what is none."""
    data = _read_json(path)
    if data.get("kind") != KIND:
        raise SaguaroConfigError(f"tuned: {path} was not written by vllm-saguaro tune (no kind {KIND!r}): {_CURE}")
    if data.get("format") != FORMAT:
        raise SaguaroConfigError(
            f"tuned: {path} has format {data.get('format')!r}, this version reads {FORMAT}: run vllm-saguaro tune again"
        )
    try:
        return Tuned(
            path,
            _choice(data["choice"]),
            Priors.from_dict(data["priors"]) if data["priors"] is not None else None,
            _made_for(data["made_for"]),
            str(data["recommended"]),
        )
    except KeyError as error:
        raise SaguaroConfigError(f"tuned: {path} lacks {error}: {_CURE}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SaguaroConfigError(f"tuned: {path} is damaged ({error}): {_CURE}") from None


def config_digest(folder: Path) -> str | None:
    """What tells one model of a name from another: a digest of its `config.json`; None where there is none."""
    try:
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _read_json(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise SaguaroConfigError(f"tuned: {path} cannot be read ({error.strerror or error}): {_CURE}") from None
    except ValueError as error:
        raise SaguaroConfigError(f"tuned: {path} is no JSON ({error}): {_CURE}") from None
    if not isinstance(data, dict):
        raise SaguaroConfigError(f"tuned: {path} holds no JSON object: {_CURE}")
    return data


def _choice(choice: Any) -> dict[str, Any]:
    """Checked as if the user had written it."""
    if not isinstance(choice, dict):
        raise ValueError("choice is no object")
    if unknown := sorted(set(choice) - set(CHOICE_KEYS)):
        raise ValueError(f"choice has the key {unknown[0]!r}, known are {', '.join(CHOICE_KEYS)}")
    split_options(choice)
    return choice


def _made_for(data: Any) -> MadeFor:
    target, draft = ((str(name), digest) for name, digest in (data["target"], data["draft"]))
    return MadeFor(target, draft, str(data["dtype"]), str(data["vllm"]), str(data["machine"]))
