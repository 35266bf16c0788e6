"""The one error that a command may end with: what the user wrote cannot be."""

from __future__ import annotations


class UsageError(Exception):
    """One line that says what was wrong and what to write instead; the command ends with exit code 2."""
