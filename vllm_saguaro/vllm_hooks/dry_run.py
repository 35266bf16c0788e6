"""The start of a server up to where weights would load, and what is known then. For `vllm-saguaro doctor` and `tune`.

Nothing is judged here: the refusals are those of a real start, made by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_saguaro.config import METHOD, SaguaroConfig, SaguaroConfigError
from vllm_saguaro.cores import CorePlan
from vllm_saguaro.vllm_hooks import compatibility
from vllm_saguaro.vllm_hooks.draft_choice import active_billions, read_vocab_size, token_ids
from vllm_saguaro.vllm_hooks.engine_args import OPTIONS_ATTRIBUTE, is_door, slow_type


@dataclass(frozen=True)
class DryRun:
    """What a start would be. Sizes are tokens, `*_billions` 10^9 parameters that a token passes through.

    `*_folder` is where the files of a model are on this machine, None where they are not. `*_tokenizer` says whether
    its vocabulary could be read for the comparison. `kv_bytes` is the target's KV cache where its size was given; else
    vLLM takes the share `memory_share` of all memory for weights and KV, and must find it free. `ignored` are words of
    the command line that vLLM's engine does not know: the server's. `ranks`: of the target.
    `gpu_memory` is all that the target's GPU has; None where the target computes on the CPU. `gpus`: all that
    are visible.
    """

    config: SaguaroConfig
    plan: CorePlan | None
    target: str
    draft: str
    target_folder: Path | None
    draft_folder: Path | None
    target_vocab: int
    draft_vocab: int
    target_tokenizer: bool
    draft_tokenizer: bool
    target_billions: float
    draft_billions: float
    target_length: int
    max_num_seqs: int
    dtype: str
    draft_dtype: str
    kv_bytes_a_token: int
    draft_kv_bytes: int
    kv_bytes: int | None
    memory_share: float
    slow_type: str | None
    ignored: tuple[str, ...]
    gpu_memory: int | None = None
    gpus: int = 0
    ranks: int = 1


def plugin_is_loaded() -> bool:
    """Let vLLM load its plugins, as each of its processes does, and look whether our doors are in place."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return is_door(EngineArgs.__dict__.get("create_speculative_config")) and is_door(
        getattr(EngineArgs.__dict__.get("add_cli_args"), "__func__", None)
    )


def dry_run(target: str, draft: str | None, words: Sequence[str]) -> DryRun:
    """Start up to the weights: `words` are further options, as `vllm serve` takes them.

    Only configurations and tokenizers are read (from the hub where they are not on this machine). Raises
    SaguaroConfigError with the one line that a start would end with; SystemExit where vLLM's parser refuses the words.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_saguaro.vllm_hooks.passing_parser import PassingParser

    parser = EngineArgs.add_cli_args(PassingParser(prog="vllm-saguaro TARGET --"))
    try:
        namespace = parser.parse_args(list(words))
        namespace.model = target
        arguments = EngineArgs.from_cli_args(namespace)
        arguments.speculative_config = _asked_for(arguments, draft)
        whole = arguments.create_engine_config()
    except SaguaroConfigError:
        raise
    except Exception as error:  # vLLM's, pydantic's and the hub client's, of any kind
        raise SaguaroConfigError(
            f"vLLM does not take this target ({compatibility.one_line(error)}): write a local folder or a hub name, "
            "and after -- what vllm serve would get"
        ) from error
    return _what_is_known(whole, parser.beyond)


def _asked_for(arguments: Any, draft: str | None) -> dict[str, Any]:
    """The speculative config as a plain dict, so that its errors come as errors and not as the end of the program."""
    written = arguments.speculative_config
    options = {"method": METHOD} if written is None else dict(written)
    if arguments.spec_method is not None:
        options["method"] = str(arguments.spec_method)
        arguments.spec_method = None
    if "method" not in options:
        raise SaguaroConfigError(f'the speculative config names no method: write "method": "{METHOD}" in it too')
    if options["method"] != METHOD:
        raise SaguaroConfigError(
            f'method "{METHOD}" alone is looked at here, the speculative config says "{options["method"]}": '
            "leave it out"
        )
    if draft is not None:
        if "model" in options or arguments.spec_model is not None:
            raise SaguaroConfigError("the draft is named twice: write it as DRAFT or in the speculative config")
        options["model"] = draft
    return options


def _what_is_known(whole: Any, ignored: tuple[str, ...]) -> DryRun:
    from vllm.platforms import current_platform

    speculative, target = whole.speculative_config, whole.model_config
    draft = speculative.draft_model_config
    options: dict[str, Any] = getattr(speculative, OPTIONS_ATTRIBUTE)
    cores = options["cores"]
    cache_type = options["draft"]["kv_cache_dtype"]
    own = {name: options["draft"][name] for name in ("model", "revision", "code_revision")}
    layers, heads, width = draft.get_total_num_hidden_layers(), draft.get_total_num_kv_heads(), draft.get_head_size()
    config, slots = SaguaroConfig.from_dict(options), whole.scheduler_config.max_num_seqs
    a_token = 2 * layers * heads * width * _item_bytes(cache_type, draft.dtype)
    gpu_memory = None if current_platform.is_cpu() else current_platform.get_device_total_memory()
    return DryRun(
        config=config,
        plan=None if cores is None else _plan(cores),
        target=str(target.model),
        draft=str(own["model"]),
        target_folder=_folder(target.model, target.revision),
        draft_folder=_folder(own["model"], own["revision"]),
        target_vocab=options["target_vocab_size"],
        draft_vocab=read_vocab_size(target, own),
        target_tokenizer=token_ids(target.tokenizer) is not None,
        draft_tokenizer=token_ids(own["model"], own["revision"]) is not None,
        target_billions=active_billions(target.hf_text_config),
        draft_billions=active_billions(draft.hf_text_config),
        target_length=target.max_model_len,
        max_num_seqs=slots,
        dtype=str(target.dtype).removeprefix("torch."),
        draft_dtype=options["draft"]["dtype"],
        kv_bytes_a_token=a_token,
        draft_kv_bytes=draft_kv_bytes(config, slots, target.max_model_len, a_token, gpu_memory),
        kv_bytes=whole.cache_config.kv_cache_memory_bytes,
        memory_share=whole.cache_config.gpu_memory_utilization,
        slow_type=slow_type(target.dtype),
        ignored=ignored,
        gpu_memory=gpu_memory,
        gpus=0 if gpu_memory is None else current_platform.device_count(),
        ranks=whole.parallel_config.world_size,
    )


def draft_kv_bytes(
    config: SaguaroConfig, slots: int, target_length: int, bytes_a_token: int, gpu_memory: int | None
) -> int:
    """The KV cache that one draft gets, as the workers reckon it. `slots`: max_num_seqs; `gpu_memory`: see `DryRun`."""
    from vllm_saguaro.drafting.buckets import default_branches
    from vllm_saguaro.vllm_hooks.draft_options import KV_BYTES
    from vllm_saguaro.vllm_hooks.stream_draft import MOST_OF_DEVICE, default_kv_tokens

    if config.placement != "stream":
        return KV_BYTES["cpu" if gpu_memory is None else "cuda"]
    if config.draft_gpu_memory is not None:
        return int(config.draft_gpu_memory * (1 << 30))
    steps = config.num_speculative_tokens
    branches = config.branches if isinstance(config.branches, int) else default_branches(steps)
    wished = bytes_a_token * default_kv_tokens(slots, branches, config.draft_max_length or target_length, steps)
    return min(wished, KV_BYTES["cpu"] if gpu_memory is None else int(MOST_OF_DEVICE * gpu_memory))


def _plan(data: dict[str, Any]) -> CorePlan:
    """The inverse of `CorePlan.to_dict`."""
    return CorePlan(
        tuple(data["target"]),
        tuple(data["draft"]),
        data["bind_target"],
        tuple(tuple(part) for part in data["ranks"]),
        data["ranks_a_node"],
    )


def _item_bytes(cache_type: str, model_type: Any) -> int:
    """Bytes of one number in the KV cache."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    dtype = model_type if cache_type == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache_type]
    return math.ceil(dtype.itemsize)


def _folder(model: str, revision: str | None) -> Path | None:
    """Where the files of a model are, if they are on this machine."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
