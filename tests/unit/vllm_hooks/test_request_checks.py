from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_saguaro.vllm_hooks.engine_args import OPTIONS_ATTRIBUTE
from vllm_saguaro.vllm_hooks.request_checks import open_door

OURS = SimpleNamespace(**{OPTIONS_ATTRIBUTE: {}})
OTHER = SimpleNamespace(method="ngram")
REFUSED: list[dict[str, Any]] = [{"min_p": 0.1}, {"logit_bias": {3: 1.5}}, {"min_p": 0.1, "logit_bias": {3: 1.5}}]


@pytest.fixture
def checked() -> type[SamplingParams]:
    """A class of sampling parameters with a check of its own that can be wrapped without touching vLLM's."""
    kind = type("Checked", (SamplingParams,), {"_validate_spec_decode": SamplingParams._validate_spec_decode})
    open_door(kind)
    return kind


@pytest.mark.parametrize("asked", REFUSED)
def test_what_vllm_refuses_is_let_through_for_our_speculation_alone(
    checked: type[SamplingParams], asked: dict[str, Any]
) -> None:
    params = checked(temperature=1.0, **asked)
    params._validate_spec_decode(OURS)
    params._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError):
        params._validate_spec_decode(OTHER)


@pytest.mark.parametrize("asked", REFUSED)
def test_the_request_keeps_what_it_asked_for(checked: type[SamplingParams], asked: dict[str, Any]) -> None:
    params = checked(temperature=1.0, **asked)
    params._validate_spec_decode(OURS)
    assert {name: getattr(params, name) for name in asked} == asked


def test_every_other_refusal_stays() -> None:
    class Check:
        min_p, logit_bias, logprob_token_ids, other = 0.5, None, None, True

        def _validate_spec_decode(self, speculative_config: Any) -> None:
            if self.min_p or self.other:
                raise ValueError("min_p" if self.min_p else "other")

    open_door(Check)
    with pytest.raises(ValueError, match="other"):
        Check()._validate_spec_decode(OURS)
    with pytest.raises(ValueError, match="min_p"):
        Check()._validate_spec_decode(OTHER)


def test_what_would_end_the_engine_is_refused(checked: type[SamplingParams]) -> None:
    params = checked(logprob_token_ids=[1, 2])
    params._validate_spec_decode(OTHER)
    with pytest.raises(VLLMValidationError, match="logprob_token_ids"):
        params._validate_spec_decode(OURS)


def test_it_is_opened_once(checked: type[SamplingParams]) -> None:
    door = checked.__dict__["_validate_spec_decode"]
    open_door(checked)
    assert checked.__dict__["_validate_spec_decode"] is door


def test_a_vllm_without_the_check_is_left_alone() -> None:
    class Bare:
        pass

    open_door(Bare)
    assert "_validate_spec_decode" not in vars(Bare)
