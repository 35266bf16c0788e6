"""What the user may write: the plugin's own keys, and which of vLLM's keys keep their meaning.

Standard library only: this module is imported while vLLM parses its command line. Every error is one line that says
what is wrong and what to write instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_saguaro.config_checks import (
    AUTO,
    SaguaroConfigError,
    require_amount,
    require_choice,
    require_cpus,
    require_fraction,
    require_int,
    require_ray_options,
    show,
)

METHOD: Final = "saguaro"

FAN_OUTS: Final = ("ranked", "uncalibrated", "geometric", "uniform")
PLACEMENTS: Final = ("process", "stream", "inline", "ray")
BACKUPS: Final = ("auto", "none", "ngram", "jit")
DRAFT_SAMPLE_METHODS: Final = ("coupled", "probabilistic", "greedy")
MAX_BRANCHES: Final = 256
AUTO_MAX_BRANCHES: Final = 48
"""N at most where it chooses itself: beyond, a branch adds a percent of hits at most."""
INLINE_BRANCHES: Final = 12
MAX_SPECULATIVE_TOKENS: Final = 16
MAX_REPLICAS: Final = 16
MAX_POOL_ENGINES: Final = 64

OWN_KEYS: Final = (
    "branches",
    "fan_out",
    "placement",
    "draft_cpus",
    "draft_gpu_memory",
    "ray_options",
    "draft_pool",
    "draft_pool_engines",
    "backup",
    "sampling_c",
    "adaptive",
    "draft_restarts",
    "draft_replicas",
    "trace",
    "tuned",
)

# vLLM's keys that mean for our draft what they mean for vLLM's own `draft_model`.
VLLM_KEYS: Final = (
    "model",
    "num_speculative_tokens",
    "max_model_len",
    "revision",
    "code_revision",
    "quantization",
    "attention_backend",
    "kv_cache_dtype",
    "moe_backend",
    "enforce_eager",
    "draft_load_config",
    "draft_tensor_parallel_size",
    "num_speculative_tokens_per_batch_size",
    "rejection_sample_method",
    "draft_sample_method",
)

# vLLM's keys that mean nothing here, each with what the user should know. A name that ends in "_" stands for all that
# begin with it.
REFUSED_KEYS: Final[Mapping[str, str]] = {
    "disable_padded_drafter_batch": "saguaro sets it itself; leave it out",
    "tensor_parallel_size": "the draft runs on one rank; leave it out",
    "parallel_drafting": "saguaro drafts for many outcomes at once already; leave it out",
    "use_heterogeneous_vocab": "the draft must have the target's vocabulary; leave it out and choose such a draft",
    "use_local_argmax_reduction": "the draft runs on one rank; leave it out",
    "disable_eagle_block_drop": "it belongs to EAGLE; leave it out",
    "index_share_for_mtp_iteration": "it belongs to MTP; leave it out",
    "enable_adaptive_verification": "it belongs to DSpark; leave it out",
    "disable_lookahead_block_hashes": "saguaro's draft keeps its own KV cache; leave it out",
    "draft_lm_head_quantization": "it belongs to EAGLE and MTP; leave it out",
    "target_model_config": "vLLM fills it in; leave it out",
    "target_parallel_config": "vLLM fills it in; leave it out",
    "draft_model_config": 'vLLM fills it in; leave it out and name the draft with "model"',
    "draft_parallel_config": "vLLM fills it in; leave it out",
    "prompt_lookup_": "it belongs to n-gram speculation; leave it out",
    "suffix_decoding_": "it belongs to suffix decoding; leave it out",
    "synthetic_": "synthetic acceptance changes the output, saguaro never does; leave it out",
    "dspark_": "it belongs to DSpark; leave it out",
    "xpress_": "it belongs to another method; leave it out",
    "fly_": "'fly' changes the output, saguaro never does; leave it out",
}

_POOL_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

EXAMPLE: Final = '{"method": "saguaro", "model": "DRAFT", "num_speculative_tokens": 4}'


@dataclass(frozen=True)
class SaguaroConfig:
    """All options of one engine, validated. It crosses processes as a plain dict (`to_dict`, `from_dict`).

    `draft_max_length` is the draft's true limit, kept here because vLLM is told the target's. It is 0 until the draft's
    configuration has been read. `draft_gpu_memory` is in GiB; None: chosen. `tuned` names the file that the keys were
    filled in from, `priors` are its measurements (`algorithm/priors.py`, as a dict), put here when it is read.
    """

    branches: int | str = AUTO
    fan_out: str = "ranked"
    placement: str = "process"
    draft_cpus: str | None = None
    draft_gpu_memory: float | None = None
    ray_options: Mapping[str, Any] | None = None
    draft_pool: str | None = None
    draft_pool_engines: int = 4
    backup: str = AUTO
    sampling_c: float | str = AUTO
    adaptive: bool | None = None
    draft_restarts: int = 5
    draft_replicas: int = 1
    trace: str | None = None
    tuned: str | None = None
    priors: Mapping[str, Any] | None = None
    draft_sample_method: str = "coupled"
    num_speculative_tokens: int = 4
    draft_max_length: int = 0

    def __post_init__(self) -> None:
        if self.branches != AUTO:
            require_int("branches", self.branches, 1, MAX_BRANCHES, or_else=AUTO)
        if self.sampling_c != AUTO:
            require_fraction("sampling_c", self.sampling_c)
        if self.adaptive is not None and not isinstance(self.adaptive, bool):
            raise SaguaroConfigError(f"adaptive must be true or false, not {show(self.adaptive)}")
        require_int("draft_restarts", self.draft_restarts, 0, None)
        require_int("draft_replicas", self.draft_replicas, 1, MAX_REPLICAS)
        if self.draft_replicas > 1 and self.placement == "inline":
            raise SaguaroConfigError(
                f'draft_replicas is {self.draft_replicas}, but with placement "inline" the draft is the target\'s own '
                'thread: write draft_replicas 1, or placement "process"'
            )
        if self.draft_gpu_memory is not None:
            require_amount("draft_gpu_memory", self.draft_gpu_memory, least=None)
        require_choice("draft_sample_method", self.draft_sample_method, DRAFT_SAMPLE_METHODS)
        require_int("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
        require_int("draft_max_length", self.draft_max_length, 0, None)
        require_choice("fan_out", self.fan_out, FAN_OUTS)
        require_choice("placement", self.placement, PLACEMENTS)
        require_choice("backup", self.backup, BACKUPS)
        if self.trace is not None and not (isinstance(self.trace, str) and self.trace.strip()):
            raise SaguaroConfigError(
                f'trace must be the name of a file, not {show(self.trace)}: write for example "trace.json"'
            )
        if self.draft_cpus is not None:
            require_cpus(self.draft_cpus)
        if self.ray_options is not None:
            if self.placement != "ray":
                raise SaguaroConfigError(
                    'ray_options go with placement "ray" alone: write "placement": "ray" too, or leave them out'
                )
            require_ray_options(self.ray_options)
        require_int("draft_pool_engines", self.draft_pool_engines, 1, MAX_POOL_ENGINES)
        if self.draft_pool is not None:
            self._check_pool(self.draft_pool)
        if self.tuned is not None and not (isinstance(self.tuned, str) and self.tuned.strip()):
            raise SaguaroConfigError(
                f"tuned must be the path of a file, not {show(self.tuned)}: write that of one that vllm-saguaro tune "
                "wrote"
            )

    def _check_pool(self, pool: object) -> None:
        if not (isinstance(pool, str) and _POOL_NAME.fullmatch(pool)):
            raise SaguaroConfigError(
                f"draft_pool must be a name of letters, digits, '-', '_' and '.', not {show(pool)}: write for example "
                '"drafts"'
            )
        if self.placement != "ray":
            raise SaguaroConfigError(
                f'draft_pool goes with placement "ray" alone, not "{self.placement}": write "placement": "ray" too, or '
                "leave it out"
            )
        if self.draft_replicas > 1:
            raise SaguaroConfigError(
                f"draft_replicas is {self.draft_replicas}, but a draft_pool is one draft: write draft_replicas 1, or "
                "leave draft_pool out"
            )

    @property
    def most_branches(self) -> int:
        """N at most: what room is made for."""
        if isinstance(self.branches, int):
            return self.branches
        return INLINE_BRANCHES if self.placement == "inline" else AUTO_MAX_BRANCHES

    @property
    def chooses_branches(self) -> bool:
        """Whether N follows what is measured. Inline the target waits for any N: there is nothing to choose by."""
        return self.branches == AUTO and self.placement != "inline"

    @property
    def chooses_itself(self) -> bool:
        """Whether K, and whether to draft at all, follow what is measured. Not where the draft works inline."""
        return self.placement != "inline" if self.adaptive is None else self.adaptive

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SaguaroConfig:
        """The inverse of `to_dict`; entries that are not ours (such as `draft`) are left to others."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in options.items() if key in names})


def split_options(options: Mapping[Any, Any]) -> tuple[SaguaroConfig, dict[str, Any]]:
    """Validate the user's dict; return our options, and the keys that go on to vLLM (without `method`).

    Nothing is looked up on disk or on the network here, so it can run while the command line is parsed.
    """
    own: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for raw_key, value in options.items():
        key = raw_key.replace("-", "_") if isinstance(raw_key, str) else raw_key
        if key == "method":
            continue
        if key in OWN_KEYS:
            own[key] = value
        elif key in VLLM_KEYS:
            if value is not None:  # vLLM's own way of saying "the default"
                passed[key] = value
        else:
            raise SaguaroConfigError(_refusal(key))
    # A dotted command-line option (--speculative-config.draft_cpus 1) arrives as a number.
    if isinstance(own.get("draft_cpus"), int) and not isinstance(own["draft_cpus"], bool):
        own["draft_cpus"] = str(own["draft_cpus"])
    if "num_speculative_tokens" in passed:
        own["num_speculative_tokens"] = passed["num_speculative_tokens"]
    # vLLM knows two of the three; its own drafter would take them for itself.
    if "draft_sample_method" in passed:
        own["draft_sample_method"] = passed.pop("draft_sample_method")
    config = SaguaroConfig(**own)
    if "draft_pool_engines" in own and config.draft_pool is None:
        raise SaguaroConfigError(
            f"draft_pool_engines is {config.draft_pool_engines}, but there is no draft_pool: name the pool too "
            '("draft_pool": "drafts"), or leave draft_pool_engines out'
        )
    passed["num_speculative_tokens"] = config.num_speculative_tokens
    _check_vllm_values(passed)
    return config, passed


def _check_vllm_values(passed: Mapping[str, Any]) -> None:
    """The few values of vLLM's keys that this version cannot serve. The rest is vLLM's to check."""
    model = passed.get("model")
    if "model" in passed and not (isinstance(model, str) and model.strip()):
        raise SaguaroConfigError(f"model must be the draft's folder or hub name, not {show(model)}: write {EXAMPLE}")
    if "max_model_len" in passed:
        require_int("max_model_len", passed["max_model_len"], 1, None)
    if "enforce_eager" in passed and not isinstance(passed["enforce_eager"], bool):
        raise SaguaroConfigError(f"enforce_eager must be true or false, not {show(passed['enforce_eager'])}")
    draft_tp = passed.get("draft_tensor_parallel_size", 1)
    if draft_tp != 1 or isinstance(draft_tp, bool):
        raise SaguaroConfigError(
            f"draft_tensor_parallel_size must be 1, not {show(draft_tp)}: the draft runs on one rank; leave it out"
        )
    rejection = passed.get("rejection_sample_method", "standard")
    if rejection in ("synthetic", "fly"):
        raise SaguaroConfigError(
            f'rejection_sample_method "{rejection}" changes the output, saguaro never does: write "standard"'
        )
    if rejection == "block":
        raise SaguaroConfigError(
            'rejection_sample_method "block" is ignored by vLLM\'s CPU runner (it samples "standard"): write "standard"'
        )
    require_choice("rejection_sample_method", rejection, ("standard",))


def _refusal(key: object) -> str:
    """Why a key is not taken: it is vLLM's but means nothing here, or it is mistyped."""
    if isinstance(key, str):
        for name, reason in REFUSED_KEYS.items():
            if key == name or (name.endswith("_") and key.startswith(name)):
                return f'the key "{key}" does not go with method "saguaro": {reason}'
    known = ("method", *OWN_KEYS, *VLLM_KEYS)
    near = difflib.get_close_matches(str(key), known, n=1)
    if near:
        return f'unknown key "{key}" in the speculative config: did you mean "{near[0]}"?'
    return f'unknown key "{key}" in the speculative config: write one of {", ".join(known)}'
