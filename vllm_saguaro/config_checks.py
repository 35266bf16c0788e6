"""Is a value that the user wrote of the kind, in the range, one of the words? If not, one line says what to write.

Standard library only, as `config.py`, whose checks these are.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Final

from vllm_saguaro.cores import parse_cpus

AUTO: Final = "auto"
RAY_KEYS: Final = ("num_cpus", "num_gpus", "resources", "runtime_env", "namespace", "address")


class SaguaroConfigError(ValueError):
    """The user asked for something that cannot be; the message is one line that says what to write instead."""


def require_int(name: str, value: object, low: int, high: int | None, or_else: str | None = None) -> None:
    """Whole numbers only; Python counts True as 1, a user does not. `or_else`: a word that is allowed as well."""
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"
    span += f', or "{or_else}"' if or_else is not None else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SaguaroConfigError(f"{name} must be a whole number, not {show(value)}: write a number {span}")
    if value < low or (high is not None and value > high):
        raise SaguaroConfigError(f"{name} is out of range: {value}; write a number {span}")


def require_fraction(name: str, value: object) -> None:
    """A number from 0 to 1, or "auto"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SaguaroConfigError(f'{name} must be a number, not {show(value)}: write a number from 0 to 1, or "{AUTO}"')
    if not 0 <= value <= 1:
        raise SaguaroConfigError(f'{name} is out of range: {value}; write a number from 0 to 1, or "{AUTO}"')


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words; a near miss is named."""
    if isinstance(value, str) and value in choices:
        return
    advice = " or ".join(f'"{choice}"' for choice in choices)
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) and len(choices) > 1 else []
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    raise SaguaroConfigError(f"{name}: {show(value)} is not a known value{hint}: write {advice}")


def require_cpus(value: object) -> None:
    """A list of cores that `cores.parse_cpus` reads. Whether the machine has them is `plan_cores`' question."""
    if not isinstance(value, str):
        raise SaguaroConfigError(f'draft_cpus must be a string, not {show(value)}: write for example "3" or "2-3,6"')
    try:
        parse_cpus(value)
    except ValueError as error:
        raise SaguaroConfigError(f"draft_cpus: {error}") from None


def require_ray_options(options: object) -> None:
    """Ray's own options for an actor, as far as they pass through. What a cluster has of them is Ray's to say."""
    if not isinstance(options, Mapping):
        raise SaguaroConfigError(
            f'ray_options must be an object, not {show(options)}: write for example {{"num_cpus": 4}}'
        )
    for key, value in options.items():
        name = f"ray_options.{key}"
        if key == "num_cpus":
            require_int(name, value, 1, None)
        elif key == "num_gpus":
            require_amount(name, value, least=0)
        elif key == "resources":
            if not isinstance(value, Mapping) or not all(isinstance(resource, str) for resource in value):
                raise SaguaroConfigError(
                    f"{name} must be an object of names and amounts, not {show(value)}: write for example "
                    '{"draft_node": 1}'
                )
            for resource, amount in value.items():
                if resource in ("CPU", "GPU"):
                    raise SaguaroConfigError(f"{name}: {resource} has a key of its own: write num_{resource.lower()}s")
                require_amount(f"{name}.{resource}", amount, least=None)
        elif key == "runtime_env":
            require_runtime_env(name, value)
        elif key in ("namespace", "address"):
            if not (isinstance(value, str) and value.strip()):
                raise SaguaroConfigError(f"{name} must be a string, not {show(value)}: leave it out, or write one")
            if key == "address" and value.startswith("ray://"):
                raise SaguaroConfigError(
                    f"{name} {show(value)} is that of a Ray client server, which cannot place a draft beside this "
                    'process: write "auto", or HOST:PORT of the cluster\'s head'
                )
        else:
            near = difflib.get_close_matches(str(key), RAY_KEYS, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"write one of {', '.join(RAY_KEYS)}"
            raise SaguaroConfigError(f'unknown key "{key}" in ray_options: {hint}')


def require_amount(name: str, value: object, least: int | None) -> None:
    """How much of a resource: of at least `least`, or (None) more than nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SaguaroConfigError(f"{name} must be a number, not {show(value)}: write how many, like 1 or 0.5")
    fits = value > 0 if least is None else value >= least
    if not (fits and value < math.inf):
        span = "a number above 0" if least is None else f"a number of at least {least}"
        raise SaguaroConfigError(f"{name} is out of range: {value}; write {span}")


def require_runtime_env(name: str, value: object) -> None:
    """It crosses to other processes as JSON, and Ray checks what is in it."""
    try:
        if not isinstance(value, Mapping):
            raise TypeError
        json.dumps(dict(value))
    except (TypeError, ValueError):
        raise SaguaroConfigError(
            f"{name} must be an object of plain values, not {show(value)}: write for example "
            '{"env_vars": {"NAME": "value"}}'
        ) from None


def show(value: object) -> str:
    """A value as the user would write it, on one line and not without end."""
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
