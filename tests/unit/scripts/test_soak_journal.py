from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking.journal import Journal
from vllm_saguaro.benchmark.settings import SettingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "deep" / "state.jsonl", {"seed": 1, "requests": 5})
    journal.add("answer", index=0)
    journal.add("fault", number=0)
    journal.add("answer", index=2)
    journal.close()
    return journal.path


def test_a_run_goes_on_with_all_that_was_written(path: Path) -> None:
    journal = Journal(path, {"seed": 1, "requests": 5})
    assert [record["index"] for record in journal.of("answer")] == [0, 2]
    assert [record["number"] for record in journal.of("fault")] == [0]
    assert journal.of("stretch") == []


def test_what_is_added_is_in_the_file_at_once(path: Path) -> None:
    journal = Journal(path, {"seed": 1, "requests": 5})
    journal.add("answer", index=4)
    assert [record["index"] for record in Journal(path, {"seed": 1, "requests": 5}).of("answer")] == [0, 2, 4]


def test_a_half_written_record_is_dropped(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"what":"answer","ind')
    journal = Journal(path, {"seed": 1, "requests": 5})
    assert [record["index"] for record in journal.of("answer")] == [0, 2]
    journal.add("answer", index=3)
    journal.close()
    again = Journal(path, {"seed": 1, "requests": 5})
    assert [record["index"] for record in again.of("answer")] == [0, 2, 3]


def test_another_soak_is_refused_and_the_difference_named(path: Path) -> None:
    with pytest.raises(SettingsError, match=r"another soak \(requests was 5, is 6; seed was 1, is 2\)"):
        Journal(path, {"seed": 2, "requests": 6})


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"what":"answer"}\n', '{"what":"soak","schema":99}\n', "x"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(SettingsError, match="not the state of a soak"):
        Journal(path, {})
    assert path.read_text() == text
