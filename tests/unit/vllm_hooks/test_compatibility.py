"""The version gate and the table of seams."""

from __future__ import annotations

from importlib import metadata

import pytest

from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.vllm_hooks import compatibility
from vllm_saguaro.vllm_hooks.compatibility import (
    Runner,
    Seam,
    check_placement,
    check_platform,
    check_seams,
    check_version,
    one_line,
)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+cpu", "v0.33.0", "0.33"])
def test_versions_that_are_served(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.3", "0.320", "dev", ""])
def test_versions_that_are_not(version: str) -> None:
    with pytest.raises(SaguaroConfigError, match=r"works with vLLM 0\.32 and 0\.33, this is vLLM ") as caught:
        check_version(version)
    assert version in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_installed_vllm_has_every_seam() -> None:
    check_version()
    check_seams(compatibility.FRONTEND)
    check_seams(compatibility.WORKER)
    check_seams(compatibility.DEVICE_WORKER)


@pytest.mark.parametrize(("newer", "fits"), [((), False), (("prefix",), False), (("prefix", "newer"), True)])
def test_a_seam_may_have_more_parameters_in_the_newer_vllm(newer: tuple[str, ...], fits: bool) -> None:
    function = Seam(compatibility.FRONTEND, "tests.unit.vllm_hooks.test_compatibility", "_seam", ("given",), newer)
    if fits:
        check_seams(compatibility.FRONTEND, (function,))
    else:
        with pytest.raises(SaguaroConfigError, match="does not know this build of vLLM"):
            check_seams(compatibility.FRONTEND, (function,))


def _seam(given: int, prefix: int, newer: int) -> None:
    """As of a newer vLLM."""


def has_triton(monkeypatch: pytest.MonkeyPatch, has: bool, wish: str | None) -> None:
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", has)
    if wish is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", wish)


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.cpu.CpuPlatform.is_cuda", lambda self: True)


@pytest.mark.parametrize(("has", "wish", "runner"), [(False, None, "V1"), (True, "0", "V1"), (True, "1", "V2")])
def test_runners_on_a_cpu(monkeypatch: pytest.MonkeyPatch, has: bool, wish: str | None, runner: str) -> None:
    has_triton(monkeypatch, has, wish)
    assert check_platform() == runner


def test_a_cpu_with_triton_is_asked_which_runner_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, True, None)
    with pytest.raises(SaguaroConfigError, match="VLLM_USE_V2_MODEL_RUNNER=0") as caught:
        check_platform()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wish", [None, "1"])
def test_a_gpu_is_served_with_runner_v2(monkeypatch: pytest.MonkeyPatch, wish: str | None) -> None:
    has_triton(monkeypatch, True, wish)
    on_cuda(monkeypatch)
    assert check_platform() is Runner.V2


@pytest.mark.parametrize(
    ("has", "wish", "line"), [(True, "0", "unset the environment variable"), (False, None, "needs Triton")]
)
def test_a_gpu_with_runner_v1_is_refused(
    monkeypatch: pytest.MonkeyPatch, has: bool, wish: str | None, line: str
) -> None:
    has_triton(monkeypatch, has, wish)
    on_cuda(monkeypatch)
    with pytest.raises(SaguaroConfigError, match=line) as caught:
        check_platform()
    assert "\n" not in str(caught.value)


def test_a_changed_seam_is_named() -> None:
    changed = Seam("frontend", "json", "dumps", ("thing",))
    with pytest.raises(SaguaroConfigError, match=r"json\.dumps is \(obj, skipkeys, .*expected \(thing\)"):
        check_seams("frontend", (changed,))
    check_seams("worker", (changed,))


@pytest.mark.parametrize(("module", "name"), [("json", "no_such"), ("no_such_module", "f")])
def test_a_missing_seam_is_named(module: str, name: str) -> None:
    with pytest.raises(SaguaroConfigError, match="is missing"):
        check_seams("frontend", (Seam("frontend", module, name, ()),))


def test_errors_of_others_fit_on_one_line() -> None:
    assert one_line(ValueError("\n  first: \nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"


def test_a_placement_in_ray_asks_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SaguaroConfigError, match=r'pip install "\.\[ray\]" in a checkout of \w+, or write') as caught:
        check_placement("ray")
    assert "\n" not in str(caught.value)


def test_other_placements_do_not_ask_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: pytest.fail(f"looked for {name}"))
    check_placement("process")
    check_placement("inline")


@pytest.mark.parametrize("found", ["2.50.0", "2.60.1", "3.0.0.dev0"])
def test_versions_of_ray_that_are_served(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(metadata, "version", {"ray": found}.__getitem__)
    check_placement("ray")


@pytest.mark.parametrize("found", ["2.49.2", "1.60.0", "dev"])
def test_versions_of_ray_that_are_not(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(metadata, "version", {"ray": found}.__getitem__)
    with pytest.raises(SaguaroConfigError, match=rf"Ray 2\.50 or newer, this is {found}: pip install"):
        check_placement("ray")
