"""Structured output: what some requests ask for, and whether a finished text is of that form."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]

STRUCTURES: tuple[dict[str, Any], ...] = (
    {
        "json": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["file", "folder", "link"]},
                "size": {"type": "integer", "minimum": 0, "maximum": 99},
                "hidden": {"type": "boolean"},
            },
            "required": ["kind", "size", "hidden"],
            "additionalProperties": False,
        },
        "disable_any_whitespace": True,
    },
    {
        "json": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
            },
            "required": ["name", "tags"],
            "additionalProperties": False,
        },
        "disable_any_whitespace": True,
    },
    {"regex": r"def [a-z_]{1,12}\([a-z]{0,4}\):"},
    {"regex": r"[0-9]{4}-[01][0-9]-[0-3][0-9]"},
    {"choice": ["True", "False", "None", "NotImplemented"]},
)
"""Values of the request's key `structured_outputs`. Each ends by itself within a few dozen tokens."""


def departure(structure: dict[str, Any], text: str) -> str:
    """In what a text that ended by itself is not of the form that was asked for; empty if it is."""
    if "choice" in structure:
        fits = text in structure["choice"]
    elif "regex" in structure:
        fits = re.fullmatch(structure["regex"], text) is not None
    else:
        try:
            jsonschema.validate(json.loads(text), structure["json"])
            fits = True
        except (json.JSONDecodeError, jsonschema.ValidationError):
            fits = False
    return "" if fits else f"{text!r} is not of the form that was asked for"
