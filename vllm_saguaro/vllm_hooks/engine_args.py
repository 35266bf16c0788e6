"""The two doors in `EngineArgs`: what the user wrote, turned into vLLM's own configuration objects.

`open_doors` wraps `EngineArgs.create_speculative_config` and `EngineArgs.add_cli_args`. Both wrappers hand everything
through untouched unless the method is saguaro. They must stay in place even where nobody asks: vLLM loads plugins once
in a process, and a second engine in that process may ask. Standard library only at import; vLLM is imported when the
method is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, Final

from vllm_saguaro import cores
from vllm_saguaro.config import METHOD, SaguaroConfig, SaguaroConfigError, split_options
from vllm_saguaro.device_options import on_device, on_host
from vllm_saguaro.trace_file import checked_path
from vllm_saguaro.vllm_hooks import compatibility
from vllm_saguaro.vllm_hooks.compatibility import Runner
from vllm_saguaro.vllm_hooks.draft_choice import (
    check_family,
    check_vocabularies,
    choose_draft,
    read_vocab_size,
    resolve_folder,
)
from vllm_saguaro.vllm_hooks.tuned_file import blamed_on_file, served_here, split_with_file

WORKER_CLASS: Final = "vllm_saguaro.vllm_hooks.worker.SaguaroWorker"
GPU_WORKER_CLASS: Final = "vllm_saguaro.vllm_hooks.gpu_worker.SaguaroGPUWorker"
V2_CPU_WORKER_CLASS: Final = "vllm_saguaro.vllm_hooks.cpu_worker_v2.SaguaroV2CPUWorker"
OPTIONS_ATTRIBUTE: Final = "saguaro"
"""Where our options travel: on the `SpeculativeConfig` object, which every process gets whole.

Not in `additional_config`: vLLM hashes that into the key of its compile cache, so each new N would compile the target
anew.
"""

MARK: Final = "_vllm_saguaro_door"


class CommandLineOptions(dict[str, Any]):
    """A speculative config typed on a command line: its errors end the program with one line, not with a traceback."""


class CommandLineMethod(str):
    """`--spec-method saguaro`, remembering like `CommandLineOptions` where it came from."""

    __slots__ = ()


class AlignVocabulary:
    """An `hf_overrides` for the draft's configuration as vLLM sees it: the target's padded vocabulary size.

    vLLM insists on equal sizes, where siblings of one family differ by padding. The draft engine uses the true size,
    which stays in our own options. A class at module level: vLLM pickles it on the way to its other processes.
    """

    def __init__(self, vocab_size: int, before: Callable[[Any], Any] | None) -> None:
        self.vocab_size = vocab_size
        self.before = before

    def __call__(self, hf_config: Any) -> Any:
        """Apply the user's override, if there is one, and then ours."""
        if self.before is not None:
            hf_config = self.before(hf_config)
        hf_config.get_text_config().vocab_size = self.vocab_size
        return hf_config


def open_doors(engine_args_class: Any) -> None:
    """Wrap the two functions, once. A vLLM that has no such functions is left alone (and refused when it is asked)."""
    create = engine_args_class.__dict__.get("create_speculative_config")
    if inspect.isfunction(create) and not is_door(create):
        engine_args_class.create_speculative_config = _create_door(create)
    add = engine_args_class.__dict__.get("add_cli_args")
    if isinstance(add, staticmethod) and not is_door(add.__func__):
        engine_args_class.add_cli_args = staticmethod(_command_line_door(add.__func__))


def is_door(function: Any) -> bool:
    """Whether our wrapper is this function or lies below it."""
    while function is not None:
        if getattr(function, MARK, False):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _command_line_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """`add_cli_args`, with the bare word and our keys understood."""

    @functools.wraps(original)
    def add_cli_args(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        for action in getattr(parser, "_actions", ()):
            if action.dest == "speculative_config":
                action.type = _parse_options(action.type)
            elif action.dest == "spec_method":
                action.type = _parse_method(action.type)
                if action.choices is not None and METHOD not in action.choices:
                    action.choices = [*action.choices, METHOD]
        return parser

    setattr(add_cli_args, MARK, True)
    return add_cli_args


def _parse_options(original: Any) -> Callable[[str], Any]:
    """The argparse type of --speculative-config: ours where it says saguaro, else the original's business."""

    def parse_speculative_config(text: str) -> Any:
        if text.strip() == METHOD:
            return CommandLineOptions(method=METHOD)
        try:
            options = json.loads(text)
        except ValueError:
            _refuse_misspelt(text.strip())
            return original(text)
        if not (isinstance(options, dict) and options.get("method") == METHOD):
            _refuse_misspelt(options.get("method") if isinstance(options, dict) else None)
            return original(text)
        try:
            split_options(options)
        except SaguaroConfigError as error:
            raise ArgumentTypeError(str(error)) from None
        return CommandLineOptions(options)

    return parse_speculative_config


def _refuse_misspelt(word: Any) -> None:
    """Raise where somebody all but wrote our name: vLLM's own message would not say so."""
    if isinstance(word, str) and difflib.get_close_matches(word.lower(), [METHOD], cutoff=0.8):
        raise ArgumentTypeError(f'unknown method "{word}": did you mean "{METHOD}"?')


def _parse_method(original: Any) -> Callable[[str], Any]:
    """The argparse type of --spec-method."""

    def parse_spec_method(text: str) -> Any:
        if text == METHOD:
            return CommandLineMethod(text)
        return original(text) if callable(original) else text

    return parse_spec_method


def _create_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """`create_speculative_config`, with our method translated."""

    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(self, "speculative_config", None)
        spec_method = getattr(self, "spec_method", None)
        word = written.get("method") if isinstance(written, dict) else written
        if METHOD not in (spec_method, word if isinstance(word, str) else None):
            cores.undo_in_frontend()
            return original(self, *args, **kwargs)
        try:
            return _create(self, original, *args, **kwargs)
        except SaguaroConfigError as error:
            if isinstance(written, CommandLineOptions) or isinstance(spec_method, CommandLineMethod):
                raise SystemExit(f"vllm_saguaro: {error}") from error
            raise

    setattr(create_speculative_config, MARK, True)
    return create_speculative_config


def _create(engine_args: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Check everything that can be checked before weights load, and translate into a `draft_model` configuration."""
    from vllm.logger import init_logger

    from vllm_saguaro.vllm_hooks import request_checks
    from vllm_saguaro.vllm_hooks.metrics import open_page
    from vllm_saguaro.vllm_hooks.ray_draft import check_cluster

    logger = init_logger(f"vllm.{__name__}")  # below "vllm": only there has vLLM's logging a handler
    compatibility.check_version()
    compatibility.check_seams(compatibility.FRONTEND)
    runner = compatibility.check_platform()
    worker_class = _worker_class(runner)
    arguments = inspect.signature(original).bind(engine_args, *args, **kwargs).arguments
    target, parallel = arguments["target_model_config"], arguments["target_parallel_config"]
    by_user = _gather(engine_args)
    config, passed, written, tuned = split_with_file(by_user)
    with blamed_on_file(tuned, by_user):
        config = on_device(config, written) if runner is Runner.V2 else on_host(config, written)
        compatibility.check_combination(engine_args, parallel, worker_class, config.placement, runner)
        compatibility.check_placement(config.placement)
        check_cluster(config)

    if "model" in passed:
        passed["model"] = resolve_folder(passed["model"])
    else:
        passed["model"] = choose_draft(target)
        logger.info('saguaro drafts with %s (name another one with "model")', passed["model"])
    draft_size = read_vocab_size(target, passed)
    target_size = target.get_vocab_size()
    check_vocabularies(target.model, target_size, target.tokenizer, passed["model"], draft_size, passed.get("revision"))

    # A schedule for K also keeps vLLM's scheduler from padding a request's first step with draft ids of -1 (0.32, 0.33:
    # `v1/core/sched/scheduler.py`), which the CPU's rejection kernel now and then accepts at temperature > 0.
    # Runner V2 marks them itself.
    if runner is Runner.V1 and not passed.get("num_speculative_tokens_per_batch_size"):
        passed["num_speculative_tokens_per_batch_size"] = [(1, 1, config.num_speculative_tokens)]
    if tuned is not None and (doubts := tuned.doubts(served_here(target.model, passed["model"], target.dtype))):
        logger.warning("Saguaro, tuned file %s: %s.", tuned.path, doubts)

    speculative = _translate(engine_args, original, target, parallel, passed, align=draft_size != target_size)
    draft = speculative.draft_model_config
    check_family(draft)
    config = dataclasses.replace(config, draft_max_length=_draft_limit(draft, target, passed, config))
    # vLLM stops all speculation of a batch (0.33: shortens the target) at the draft's limit. Our draft side skips just
    # the requests beyond it, so vLLM is told that there is none.
    draft.max_model_len = target.max_model_len

    if config.trace is not None:
        config = dataclasses.replace(config, trace=checked_path(config.trace))
    plan = _plan_cores(config, parallel.tensor_parallel_size)
    if plan is not None:
        logger.info("saguaro: %s", plan.describe())

    if runner is Runner.V1 and (slow := slow_type(target.dtype)):
        logger.warning("%s", slow)

    parallel.worker_cls = worker_class
    if runner is Runner.V1:
        # Unpadded drafts need it off; said here so that vLLM does not warn of what the user cannot change.
        engine_args.async_scheduling = False
    else:
        logger.warning(
            "saguaro: the path through model runner V2 is tested without a GPU only; no GPU has run this release. "
            "Outputs stay the target's own; please report what you see."
        )
    options = {
        **config.to_dict(),
        "draft": _draft_options(engine_args, speculative, passed, config.draft_max_length),
        "target_vocab_size": target_size,
        "cores": plan.to_dict() if plan is not None else None,
        "counters": open_page(_served_name(engine_args, target)),
    }
    setattr(speculative, OPTIONS_ATTRIBUTE, options)
    request_checks.open_door()
    if getattr(engine_args, "otlp_traces_endpoint", None):
        _open_door_of_spans()
    return speculative


def _open_door_of_spans() -> None:
    """Only where requests are traced: it imports vLLM's engine."""
    from vllm_saguaro.vllm_hooks import request_spans

    request_spans.open_door()


def _worker_class(runner: Runner) -> str:
    """The worker door for this platform and runner."""
    from vllm.platforms import current_platform

    if runner is Runner.V1:
        return WORKER_CLASS
    return V2_CPU_WORKER_CLASS if current_platform.is_cpu() else GPU_WORKER_CLASS


def slow_type(dtype: Any) -> str | None:
    """What to know of a target in this torch type on this processor; None where all is well."""
    if str(dtype) == "torch.bfloat16" and cores.bf16_is_slow(cores.processor_flags()):
        return "This processor emulates bfloat16 (no AVX-512 BF16, no AMX): --dtype float32 is about twice as fast."
    return None


def _plan_cores(config: SaguaroConfig, ranks: int) -> cores.CorePlan | None:
    """The one call site of the core planner: all else is checked, and no worker process has started yet.

    None where the draft has no process: it then works in the target's thread, or on the target's device.
    """
    cores.undo_in_frontend()
    if config.placement in ("inline", "stream"):
        return None
    try:
        return cores.apply_in_frontend(config.draft_cpus, ranks=ranks, drafts=config.draft_replicas)
    except ValueError as error:
        raise SaguaroConfigError(str(error)) from error


def _draft_limit(draft: Any, target: Any, passed: dict[str, Any], config: SaguaroConfig) -> int:
    """The longest text that the draft may hold: its own limit, but no more than the target's texts and their branches.

    vLLM has already lowered the draft's `max_model_len` to the target's.
    """
    limit = int(draft.max_model_len)
    hf_config = draft.hf_text_config
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if passed.get("max_model_len") is not None or rope.get("rope_type", "default") != "default":
        return limit  # with scaled positions a longer limit may change how the draft computes the short texts too
    trained = getattr(hf_config, "max_position_embeddings", None) or limit
    return max(limit, min(int(trained), target.max_model_len + config.num_speculative_tokens + 1))


def _served_name(engine_args: Any, target: Any) -> str:
    """The model's name in vLLM's own metrics: the first of its served names."""
    served = engine_args.served_model_name or target.model
    return served if isinstance(served, str) else served[0]


def _gather(engine_args: Any) -> dict[str, Any]:
    """The user's dict, the bare word, and the --spec-* flags, as one new dict (the user's own is never written to)."""
    written = engine_args.speculative_config
    if isinstance(written, str):
        written = {"method": written}
    options = {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in (written or {}).items()}
    for flag, key in (("spec_method", "method"), ("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
        value = getattr(engine_args, flag, None)
        if value is None:
            continue
        if key in options:
            name = flag.replace("_", "-")
            raise SaguaroConfigError(
                f'--{name} and "{key}" in the speculative config say the same thing: write one of them'
            )
        options[key] = value
    return options


def _translate(
    engine_args: Any, original: Callable[..., Any], target: Any, parallel: Any, passed: dict[str, Any], align: bool
) -> Any:
    """Let vLLM build its `draft_model` configuration from a copy, and leave the arguments as the user wrote them."""
    written = {
        name: getattr(engine_args, name) for name in ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    }
    overrides = target.hf_overrides
    try:
        engine_args.spec_method = engine_args.spec_model = engine_args.spec_tokens = None
        # Whatever the target is divided into, the draft is whole; so vLLM must not look for parts of its heads.
        engine_args.speculative_config = {**passed, "method": "draft_model", "draft_tensor_parallel_size": 1}
        if align:
            # The only way in: vLLM builds the draft's ModelConfig and takes over callables, not dicts, from the target.
            target.hf_overrides = AlignVocabulary(target.get_vocab_size(), overrides if callable(overrides) else None)
        speculative = original(engine_args, target, parallel)
    except Exception as error:  # vLLM's and pydantic's errors of any kind, in one line
        raise SaguaroConfigError(f"vLLM does not take this draft: {compatibility.one_line(error)}") from error
    finally:
        target.hf_overrides = overrides
        for name, value in written.items():
            setattr(engine_args, name, value)
    if speculative.method != "draft_model":
        raise SaguaroConfigError(
            f'{passed["model"]} is no ordinary language model (vLLM takes it for "{speculative.method}"): '
            'write a small model of the target\'s family as "model"'
        )
    # The runner makes vLLM's own drafter before ours takes its place, and that one insists on equal numbers of ranks.
    speculative.target_parallel_config = speculative.draft_parallel_config
    return speculative


def _draft_options(engine_args: Any, speculative: Any, passed: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    """What the draft side needs to build the draft's own engine arguments in another process: plain values only."""
    draft, load = speculative.draft_model_config, speculative.draft_load_config
    eager = passed.get("enforce_eager")
    backend, cache_dtype = speculative.attention_backend, speculative.kv_cache_dtype
    return {
        "model": passed["model"],
        "revision": passed.get("revision"),
        "code_revision": passed.get("code_revision"),
        "trust_remote_code": bool(draft.trust_remote_code),
        "config_format": str(draft.config_format),
        "dtype": str(draft.dtype).removeprefix("torch."),
        "quantization": passed.get("quantization"),
        "max_model_len": max_model_len,
        "seed": draft.seed,
        "enforce_eager": bool(draft.enforce_eager if eager is None else eager),
        "compilation_mode": _compilation_mode(engine_args),
        "attention_backend": getattr(backend, "name", None),
        "kv_cache_dtype": str(cache_dtype or engine_args.kv_cache_dtype),
        "moe_backend": passed.get("moe_backend"),
        "load_format": str(load.load_format if load else engine_args.load_format),
        "download_dir": load.download_dir if load else engine_args.download_dir,
    }


def _compilation_mode(engine_args: Any) -> int | None:
    """The mode that the user wrote for the target, or None: vLLM compiles its own `draft_model` as it does the target.

    What `enforce_eager` makes of the target's is not meant: the draft has an `enforce_eager` of its own.
    """
    mode = engine_args.compilation_config.mode
    if mode is None and engine_args.optimization_level == 0:
        return 0
    return None if mode is None else int(mode)
