"""The door in vLLM's tracing of requests (vLLM 0.32 and 0.33, `OutputProcessor.do_tracing`).

With `--otlp-traces-endpoint` vLLM exports a span `llm_request` for each request. The attributes are a local of the
function that opens, fills and ends it, so none can be added from outside. What vLLM counts of a request's speculation
(`--per-request-spec-decode-metrics`) is not among them: here it becomes a span of its own beside that one, with the
same parent, beginning and request id. Hits are not in it: nothing carries them from the worker to the front end by
request.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm.tracing import SpanAttributes, extract_trace_context, instrument_manual
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_saguaro.vllm_hooks.engine_args import MARK, is_door

SPAN: Final = "llm_request.speculation"
ATTRIBUTES: Final[Mapping[str, str]] = {
    "saguaro.drafted_tokens": "num_draft_tokens",
    "saguaro.accepted_tokens": "num_accepted_draft_tokens",
    "saguaro.steps": "num_spec_steps",
    "saguaro.mean_acceptance_length": "mean_acceptance_length",
    "saguaro.draft_acceptance_rate": "draft_acceptance_rate",
}
"""Our names of what `RequestSpecDecodeMetrics.to_dict` has."""

_PARAMETERS: Final = ("self", "engine_core_output", "req_state", "iteration_stats")


def open_door(output_processor_class: Any = OutputProcessor) -> None:
    """Wrap the function, once. A vLLM that has another one is left alone: then there are no such spans."""
    original = output_processor_class.__dict__.get("do_tracing")
    if not inspect.isfunction(original) or is_door(original):
        return
    if tuple(inspect.signature(original).parameters) == _PARAMETERS:
        output_processor_class.do_tracing = _door(original)


def _door(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's own span, and then ours where vLLM has counted."""

    @functools.wraps(original)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        original(self, engine_core_output, req_state, iteration_stats)
        found = getattr(req_state, "spec_decode_metrics", None)
        if found is None:
            return
        counted = found.to_dict()
        instrument_manual(
            span_name=SPAN,
            start_time=int(req_state.stats.arrival_time * 1e9),
            attributes={
                SpanAttributes.GEN_AI_REQUEST_ID: req_state.external_req_id,
                **{ours: counted[theirs] for ours, theirs in ATTRIBUTES.items()},
            },
            context=extract_trace_context(engine_core_output.trace_headers),
        )

    setattr(do_tracing, MARK, True)
    return do_tracing
