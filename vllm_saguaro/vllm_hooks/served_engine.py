"""An engine in this process with the options of a server: what `vllm serve TARGET ...` would start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def load_served(target: str, words: Sequence[str], speculative_config: Mapping[str, Any] | None) -> Any:
    """A `vllm.LLM`; `speculative_config` stands for whatever the words say of speculation. Metrics are on."""
    from vllm import LLM

    arguments = _arguments(target, words)
    arguments.spec_method = arguments.spec_model = arguments.spec_tokens = None
    arguments.speculative_config = dict(speculative_config) if speculative_config is not None else None
    arguments.disable_log_stats = False
    with sized_as_a_server():
        return LLM.from_engine_args(arguments)


@contextlib.contextmanager
def sized_as_a_server() -> Iterator[None]:
    """`vllm.LLM` takes other numbers of requests and tokens a step than a server, where none are written."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    original = EngineArgs.__dict__["get_batch_defaults"]
    usual = EngineArgs.get_batch_defaults

    def get_batch_defaults(world_size: int) -> tuple[dict[Any, int], ...]:
        served = UsageContext.OPENAI_API_SERVER
        return tuple({**sizes, UsageContext.LLM_CLASS: sizes[served]} for sizes in usual(world_size))

    EngineArgs.get_batch_defaults = staticmethod(get_batch_defaults)
    try:
        yield
    finally:
        EngineArgs.get_batch_defaults = original


def written_speculation(target: str, words: Sequence[str]) -> dict[str, Any]:
    """The keys of the speculative config that the words have, by their names with underscores, without the method."""
    arguments = _arguments(target, words)
    found = {key.replace("-", "_"): value for key, value in dict(arguments.speculative_config or {}).items()}
    found |= {"model": arguments.spec_model} if arguments.spec_model is not None else {}
    found |= {"num_speculative_tokens": arguments.spec_tokens} if arguments.spec_tokens is not None else {}
    return {key: value for key, value in found.items() if key != "method" and value is not None}


def _arguments(target: str, words: Sequence[str]) -> Any:
    """vLLM's `EngineArgs` of these words; those that are the server's own are passed over."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_saguaro.vllm_hooks.passing_parser import PassingParser

    parser = EngineArgs.add_cli_args(PassingParser(prog="vllm-saguaro tune TARGET --"))
    namespace = parser.parse_args(list(words))
    namespace.model = target  # before anybody looks for the default one in the hub's cache
    return EngineArgs.from_cli_args(namespace)
