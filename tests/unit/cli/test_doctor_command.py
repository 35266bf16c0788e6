"""What is looked at, in which order, and the exit code; the checks themselves have tests of their own."""

from __future__ import annotations

import json

import pytest

from vllm_saguaro import cores
from vllm_saguaro.cli import doctor_command, installation
from vllm_saguaro.cli.finding import Finding, Level, error, ok, warning
from vllm_saguaro.cli.main import main
from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.vllm_hooks import compatibility


def run(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *words: str) -> int:
    monkeypatch.setattr(doctor_command, "examine", lambda *_: findings)
    return main(["doctor", *words])


def test_warnings_end_with_0_and_errors_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, [ok("a", "well"), warning("b", "so so", "c")]) == 0
    assert "1 ok, 1 warning, 0 error: it will run" in capsys.readouterr().out
    assert run(monkeypatch, [error("a", "bad", "do this")]) == 1
    assert "it will not run" in capsys.readouterr().out


def test_json_is_all_that_stands_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(*_: object) -> list[Finding]:
        print("vLLM's log")
        return [error("a", "bad", "do this")]

    monkeypatch.setattr(doctor_command, "examine", noisy)
    assert main(["doctor", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "ok": False,
        "findings": [{"level": "error", "subject": "a", "text": "bad", "advice": "do this"}],
    }
    assert said.err == "vLLM's log\n"


def test_without_vllm_what_can_be_said_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version_of", lambda name: None)
    monkeypatch.setattr(doctor_command, "vllm_itself", lambda: pytest.fail("there is no vLLM to look at"))
    assert [finding.subject for finding in doctor_command.examine("t", None, [])] == ["versions", "plugin", "cores"]


def test_a_vllm_that_is_refused_keeps_the_pair_from_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise SaguaroConfigError("this is vLLM 9: install another")

    monkeypatch.setattr(compatibility, "check_version", refuse)
    monkeypatch.setattr(doctor_command, "pair", lambda *_: pytest.fail("it cannot start"))
    found = {finding.subject: finding for finding in doctor_command.examine("t", None, [])}
    assert found["vllm"].text == "this is vLLM 9"
    assert found["vllm"].advice == "install another"
    assert "cores" in found


def test_words_for_vllm_need_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--", "--dtype", "float32"]) == 2
    assert "TARGET" in capsys.readouterr().err


@pytest.mark.slow
def test_the_committed_pair_will_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.repository import ROOT

    monkeypatch.setattr(installation, "memory_available", lambda: (32 << 30, 31 << 30))  # whatever else runs here
    target = ROOT / "assets" / "pair" / "target"
    # With a size for the KV cache the answer does not depend on how much of this machine's memory others have just now.
    words = ["--dtype", "float32", "--kv-cache-memory-bytes", "67108864"]
    assert main(["doctor", str(target), "--json", "--", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {"versions", "plugin", "vllm", "platform", "models", "vocabulary", "memory", "branches"} <= {
        finding["subject"] for finding in found["findings"]
    }


def test_the_placements_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    host = doctor_command.Host(on_cpu=True, on_v2=False)
    monkeypatch.setattr(cores, "allowed_cpus", lambda: (0,))
    assert "process (on the target's only core)" in doctor_command.placement(host).text
    monkeypatch.setattr(cores, "one_cpu_a_core", lambda cpus: (0, 1))
    assert doctor_command.placement(host).text.startswith(("process, inline, ray (Ray", "process, inline; not ray ("))


def test_without_a_gpu_a_pair_for_cuda_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    host = doctor_command.Host(on_cpu=False, on_v2=True, gpus=0)
    monkeypatch.setattr(doctor_command, "vllm_itself", lambda: ([], host))
    monkeypatch.setattr(doctor_command, "pair", lambda *_: pytest.fail("it cannot start"))
    found = {finding.subject: finding for finding in doctor_command.examine("t", None, [])}
    assert found["placement"].level is Level.ERROR


def test_that_no_gpu_has_run_it_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "check_platform", lambda: compatibility.Runner.V1)
    assert doctor_command.platform()[1].level is Level.OK
    monkeypatch.setattr(compatibility, "check_platform", lambda: compatibility.Runner.V2)
    host, found = doctor_command.platform()
    assert host.on_v2
    assert found.level is Level.WARNING
    assert "no GPU has run" in found.text


def test_a_platform_that_is_refused_keeps_the_pair_from_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise SaguaroConfigError('this is "xpu": write method "draft_model" here')

    monkeypatch.setattr(compatibility, "check_platform", refuse)
    monkeypatch.setattr(doctor_command, "pair", lambda *_: pytest.fail("it cannot start"))
    found = {finding.subject: finding for finding in doctor_command.examine("t", None, [])}
    assert found["platform"].text == 'this is "xpu"'
