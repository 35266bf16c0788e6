from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import pictures, watch_picture
from scripts.illustrations.branches import TEXT, K, cells, span_of
from scripts.illustrations.outcomes import accepted_lengths
from scripts.illustrations.rounds import depths_by, measured
from vllm_saguaro.benchmark.records import Report


def test_all_pictures_are_drawn_and_the_committed_ones_are_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.main(["--output", str(tmp_path / "new")])
    drawn = {path.name for path in (tmp_path / "new").iterdir()}
    assert drawn == {f"{name}.png" for name in pictures.PICTURES}
    committed = {path.name for path in pictures.OUTPUT.iterdir()}
    # watch_picture.py needs a server and a browser, `tune --picture` minutes of measuring (docs/command.md).
    assert committed - drawn == {watch_picture.OUTPUT.name, "tune.png"}
    assert drawn <= committed
    for name in drawn:
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("written to") == len(drawn)


def test_the_times_are_those_of_the_report() -> None:
    times = measured(Report.read(pictures.REPORT), 4)
    assert times.plain.step == pytest.approx(6.12, abs=0.005)
    assert times.draft_model.drafting == pytest.approx(5.27, abs=0.005)
    assert times.draft_model.step == pytest.approx(14.60, abs=0.005)
    assert times.saguaro.drafting == pytest.approx(8.57, abs=0.005)
    assert times.saguaro.hit_rate == pytest.approx(0.801, abs=0.0005)


def test_a_report_without_an_engine_is_refused() -> None:
    report = Report.read(pictures.REPORT)
    with pytest.raises(ValueError, match="no draft_model and no saguaro at batch 1, T=0 with K=7"):
        measured(report, 7)
    with pytest.raises(ValueError, match="no draft_model at batch 1, T=0 with K=7"):
        accepted_lengths(report, 7)


def test_accepted_lengths_are_a_distribution() -> None:
    lengths = accepted_lengths(Report.read(pictures.REPORT), 4)
    assert len(lengths) == 5
    assert min(lengths) > 0
    assert sum(lengths) == pytest.approx(1)
    assert lengths[4] == pytest.approx(0.2294, abs=0.0001)


@pytest.mark.parametrize(
    ("milliseconds", "depths"), [(0.0, 0), (1.0, 0), (1.99, 0), (2.0, 1), (4.9, 3), (5.0, 4), (99.0, 4)]
)
def test_depths_come_one_after_the_other(milliseconds: float, depths: int) -> None:
    assert depths_by(milliseconds, draft_round=5.0, k=4) == depths


@pytest.mark.parametrize("accepted", range(K + 1))
def test_a_branch_writes_from_its_bonus_token_on(accepted: int) -> None:
    kinds = cells(accepted)
    assert [place for place, kind in enumerate(kinds) if kind == "own"] == list(
        range(TEXT + accepted, TEXT + accepted + K)
    )
    assert ("copied" in kinds) is span_of(accepted).copies


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["clouds"], r"there is no picture clouds: write rounds or outcomes or branches"),
        (["rounds", "--k", "7"], r"the report has no draft_model"),
        (["rounds", "--report", "nothing.json"], r"nothing\.json"),
    ],
)
def test_a_wrong_wish_gets_one_line(words: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"^pictures\.py: [^\n]*{complaint}"):
        pictures.main([*words, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
