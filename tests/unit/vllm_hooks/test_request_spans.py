"""What vLLM has counted of a request's speculation becomes a span beside its own one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

from vllm_saguaro.vllm_hooks import request_spans
from vllm_saguaro.vllm_hooks.engine_args import is_door

Spans = list[dict[str, Any]]


class Processor:
    """As far as the door goes."""

    def do_tracing(self, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        engine_core_output.happened.append("vLLM's span")


def finished(metrics: RequestSpecDecodeMetrics | None) -> tuple[Any, Any]:
    output = SimpleNamespace(happened=[], trace_headers={"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"})
    state = SimpleNamespace(
        spec_decode_metrics=metrics, stats=SimpleNamespace(arrival_time=2.5), external_req_id="request"
    )
    return output, state


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    found: Spans = []
    monkeypatch.setattr(request_spans, "instrument_manual", lambda **span: found.append(span))
    return found


@pytest.fixture
def processor() -> Any:
    class Doored(Processor):
        do_tracing = Processor.do_tracing

    request_spans.open_door(Doored)
    return Doored()


def test_a_request_that_speculated_has_a_span_of_its_own(processor: Any, spans: Spans) -> None:
    metrics = RequestSpecDecodeMetrics.new(4)
    metrics.observe(4, 3)
    metrics.observe(2, 0)
    output, state = finished(metrics)
    processor.do_tracing(output, state, None)
    (span,) = spans
    context = span.pop("context")
    assert output.happened == ["vLLM's span"]
    assert next(iter(context.values())).get_span_context().span_id == int("2" * 16, 16)
    assert span == {
        "span_name": "llm_request.speculation",
        "start_time": 2_500_000_000,
        "attributes": {
            "gen_ai.request.id": "request",
            "saguaro.drafted_tokens": 6,
            "saguaro.accepted_tokens": 3,
            "saguaro.steps": 2,
            "saguaro.mean_acceptance_length": 2.5,
            "saguaro.draft_acceptance_rate": 0.5,
        },
    }


def test_where_vllm_has_counted_nothing_its_own_span_is_all(processor: Any, spans: Spans) -> None:
    output, state = finished(None)
    processor.do_tracing(output, state, None)
    assert (output.happened, spans) == (["vLLM's span"], [])


def test_the_door_is_opened_once_and_only_where_it_fits() -> None:
    class Twice(Processor):
        do_tracing = Processor.do_tracing

    request_spans.open_door(Twice)
    first = Twice.do_tracing
    request_spans.open_door(Twice)
    assert Twice.do_tracing is first
    assert is_door(first)

    class Other:
        def do_tracing(self, something_else: Any) -> None: ...

    before = Other.do_tracing
    request_spans.open_door(Other)
    assert Other.do_tracing is before


def test_this_vllm_has_the_place_for_the_door() -> None:
    class Real:
        do_tracing = OutputProcessor.__dict__["do_tracing"]

    request_spans.open_door(Real)
    assert is_door(Real.do_tracing)
