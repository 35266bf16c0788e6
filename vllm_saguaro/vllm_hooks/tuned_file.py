"""`"tuned": FILE` at the start of an engine: the choice filled in, one warning where it was made for another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_saguaro import cores, tuned
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError, split_options
from vllm_saguaro.tuned import MadeFor, Tuned


def split_with_file(
    written: dict[str, Any],
) -> tuple[SaguaroConfig, dict[str, Any], dict[str, Any], Tuned | None]:
    """`split_options` with the keys of the tuned file where the user wrote none.

    Our options, the keys that go on to vLLM, all that counts as written, and the file. Raises SaguaroConfigError.
    """
    config, passed = split_options(written)  # a wrong key is said before any file is looked at
    if config.tuned is None:
        return config, passed, written, None
    file = tuned.read(config.tuned)
    whole = file.fill_in(written)
    with blamed_on_file(file, written):
        config, passed = split_options(whole)
    priors = file.priors.to_dict() if file.priors is not None else None
    return dataclasses.replace(config, priors=priors), passed, whole, file


@contextlib.contextmanager
def blamed_on_file(file: Tuned | None, written: Mapping[str, Any]) -> Iterator[None]:
    """A refusal within says which keys are the file's, since the user never wrote them. `written`: what he wrote."""
    try:
        yield
    except SaguaroConfigError as error:
        own = file.own(written) if file is not None else {}
        if file is None or not own:
            raise
        raise SaguaroConfigError(f"{error} (the tuned file {file.path} has {json.dumps(own)})") from error


def served_here(target: str, draft: str, dtype: Any) -> MadeFor:
    """What this engine would be, as a tuned file knows it. `dtype`: the target's, of torch."""
    from vllm import __version__

    return MadeFor(_model(target), _model(draft), str(dtype).removeprefix("torch."), __version__, _machine())


def _model(name: str) -> tuple[str, str | None]:
    return name, tuned.config_digest(Path(name))


def _machine() -> str:
    """The processor and how many cores may be used, or the GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    return f"{cores.processor_name()}, {len(cores.allowed_cpus())} cores"
