"""The door in the frontend's check of requests (vLLM 0.32 and 0.33, `SamplingParams._validate_spec_decode`).

vLLM refuses `min_p` and `logit_bias` as soon as any speculation is configured, because its rejection sampler does not
apply them. Ours does (`rejection_sampler.py`), so these two are let through where the speculation is ours. What vLLM
lets through but cannot do is refused: `logprob_token_ids`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_saguaro.vllm_hooks.engine_args import MARK, OPTIONS_ATTRIBUTE, is_door


def open_door(sampling_params_class: Any = SamplingParams) -> None:
    """Wrap the check, once. A vLLM that has none is left alone: it refuses nothing."""
    original = sampling_params_class.__dict__.get("_validate_spec_decode")
    if inspect.isfunction(original) and not is_door(original):
        sampling_params_class._validate_spec_decode = _door(original)


def _door(original: Callable[..., None]) -> Callable[..., None]:
    """The check, blind for `min_p` and `logit_bias` where the speculative config is ours; it still does all else."""

    @functools.wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if hasattr(speculative_config, OPTIONS_ATTRIBUTE):
            if self.logprob_token_ids:
                # vLLM's rejection sampler mistakes the shape of these, which would end the engine.
                raise VLLMValidationError("logprob_token_ids does not go with speculative decoding: leave it out")
            if self.min_p or self.logit_bias:
                self = copy.copy(self)
                self.min_p, self.logit_bias = 0.0, None
        original(self, speculative_config)

    setattr(_validate_spec_decode, MARK, True)
    return _validate_spec_decode
