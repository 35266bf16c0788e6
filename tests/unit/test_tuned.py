"""The file of `vllm-saguaro tune` as a start reads it: what it fills in, what it is refused for, when it is doubted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_saguaro import tuned
from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.tuned import MadeFor

PRIORS = {
    "target_pass": [0.02, 0.001],
    "draft_step": [0.002, 0.0001],
    "glue": 0.003,
    "acceptance": [0.8, 0.6],
    "hits": [[12, 0.9]],
}
MADE_FOR = {"target": ["t", "abc"], "draft": ["d", None], "dtype": "float32", "vllm": "0.32.0", "machine": "X, 2 cores"}
FILE: dict[str, Any] = {
    "kind": tuned.KIND,
    "format": 1,
    "recommended": "saguaro",
    "choice": {"num_speculative_tokens": 6, "branches": 24, "backup": "none"},
    "priors": PRIORS,
    "made_for": MADE_FOR,
}
HERE = MadeFor(("t", "abc"), ("d", None), "float32", "0.32.0", "X, 2 cores")


def written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({**FILE, **changes}))
    return str(path)


def test_the_choice_fills_in_what_the_user_has_not_written(tmp_path: Path) -> None:
    file = tuned.read(written(tmp_path))
    filled = file.fill_in({"method": "saguaro", "tuned": file.path, "branches": 8, "model": None})
    assert filled == {
        "method": "saguaro",
        "tuned": file.path,
        "num_speculative_tokens": 6,
        "branches": 8,
        "backup": "none",
    }
    assert file.priors is not None
    assert file.priors.to_dict() == PRIORS


def test_a_file_without_priors_has_a_choice_alone(tmp_path: Path) -> None:
    assert tuned.read(written(tmp_path, priors=None)).priors is None


def refusal(path: str) -> str:
    with pytest.raises(SaguaroConfigError) as caught:
        tuned.read(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"tuned: {path} ")
    return said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "report"}, "was not written by vllm-saguaro tune"),
        ({"format": 2}, "has format 2, this version reads 1: run vllm-saguaro tune again"),
        ({"choice": []}, "is damaged (choice is no object)"),
        ({"choice": {"draft_cpus": "1"}}, "is damaged (choice has the key 'draft_cpus', known are model, "),
        ({"choice": {"branches": 0}}, "is damaged (branches is out of range: 0; write a number from 1 to 256"),
        ({"choice": {"placement": "elsewhere"}}, 'is damaged (placement: "elsewhere" is not a known value'),
        ({"priors": {"glue": 1}}, "is damaged (it must have the keys target_pass, "),
        ({"priors": {**PRIORS, "glue": -1}}, "is damaged (glue must be a time in seconds, not -1)"),
        ({"priors": 7}, "is damaged"),
        ({"made_for": {}}, "lacks 'target'"),
        ({"made_for": {**MADE_FOR, "target": "t"}}, "is damaged"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    said = refusal(written(tmp_path, **changes))
    assert says in said
    assert "write the path of a file that vllm-saguaro tune wrote" in said or "tune again" in said


@pytest.mark.parametrize("key", ["choice", "priors", "made_for", "recommended"])
def test_a_key_that_lacks_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({name: value for name, value in FILE.items() if name != key}))
    assert f"lacks '{key}'" in refusal(str(path))


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is no JSON"), ("[1]", "holds no JSON object"), ('"word"', "holds no JSON object")]
)
def test_what_is_no_object_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    assert says in refusal(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(str(tmp_path / "nothing.json"))
    assert "cannot be read (Is a directory)" in refusal(str(tmp_path))


def test_where_all_is_as_it_was_there_is_no_doubt(tmp_path: Path) -> None:
    assert tuned.read(written(tmp_path)).doubts(HERE) is None


def test_a_model_is_known_by_its_configuration_and_else_by_its_name(tmp_path: Path) -> None:
    file = tuned.read(written(tmp_path))
    assert file.doubts(dataclasses.replace(HERE, target=("elsewhere/t", "abc"))) is None
    assert "target t, here t" in str(file.doubts(dataclasses.replace(HERE, target=("t", "xyz"))))
    assert "draft d, here e" in str(file.doubts(dataclasses.replace(HERE, draft=("e", "abc"))))


def test_every_difference_is_named_in_one_line(tmp_path: Path) -> None:
    here = MadeFor(("u", "x"), ("e", None), "bfloat16", "0.33.0", "Y, 8 cores")
    assert tuned.read(written(tmp_path)).doubts(here) == (
        "it was measured with target t, here u; draft d, here e; dtype float32, here bfloat16; vllm 0.32.0, here "
        "0.33.0; machine X, 2 cores, here Y, 8 cores: its choice may be wrong here"
    )


@pytest.mark.parametrize(("method", "name"), [("plain", "plain vLLM"), ("draft_model", 'method "draft_model"')])
def test_a_file_that_found_something_faster_says_so(tmp_path: Path, method: str, name: str) -> None:
    doubts = tuned.read(written(tmp_path, recommended=method)).doubts(HERE)
    assert doubts == f"when it was measured {name} was faster than saguaro"


def test_what_a_file_was_made_for_survives_json(tmp_path: Path) -> None:
    path = written(tmp_path, made_for=json.loads(json.dumps(HERE.to_dict())))
    assert tuned.read(path).made_for == HERE


def test_a_digest_changes_with_the_configuration(tmp_path: Path) -> None:
    assert tuned.config_digest(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    first = tuned.config_digest(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert first is not None
    assert tuned.config_digest(tmp_path) not in (None, first)


def test_a_path_from_home_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.read("~/tuned.json").choice == FILE["choice"]
