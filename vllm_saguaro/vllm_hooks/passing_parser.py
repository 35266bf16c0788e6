"""vLLM's command line with words in it that are not the engine's: those of the server."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from vllm.utils.argparse_utils import FlexibleArgumentParser


class PassingParser(FlexibleArgumentParser):
    """`beyond` are the words that it does not know.

    For `parse_args`: there alone vLLM reads underscores, dotted keys, `-O3` and `--config`.
    """

    beyond: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        """All words count as known."""
        namespace, beyond = super().parse_known_args(args, namespace)
        self.beyond = tuple(beyond)
        return namespace, []
