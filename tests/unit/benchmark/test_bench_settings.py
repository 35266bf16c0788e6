from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import bench
from scripts.repository import ROOT
from vllm_saguaro.benchmark import options, provenance, settings
from vllm_saguaro.benchmark.settings import Settings, SettingsError


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a pair, on a machine of four cores."""
    monkeypatch.setattr(settings, "allowed_cores", lambda: (0, 1, 2, 3))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    target = tmp_path / "target"
    (target / "draft").mkdir(parents=True)
    for folder in (target, target / "draft"):
        (folder / "config.json").write_text("{}")
    lines = [json.dumps({"prompt": f"prompt {number}", "source": "x.py"}) for number in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return target


def test_engines_are_all_combinations_plain_first() -> None:
    chosen = Settings(modes=("saguaro", "draft_model", "plain"), k=(3, 4), branches=(6, 12), fan_out=("ranked",))
    assert [engine.name for engine in chosen.engines()] == [
        "plain",
        "draft_model K=3",
        "draft_model K=4",
        "saguaro K=3 N=6 ranked",
        "saguaro K=3 N=12 ranked",
        "saguaro K=4 N=6 ranked",
        "saguaro K=4 N=12 ranked",
    ]
    names = [workload.name for workload in Settings(batch=(1, 8), temperature=(0.0, 1.0)).workloads()]
    assert names == ["batch 1, T=0", "batch 1, T=1", "batch 8, T=0", "batch 8, T=1"]


def test_top_p_is_a_dimension_of_the_workload() -> None:
    chosen = Settings(batch=(1,), temperature=(0.7, 1.0), top_p=(1.0, 0.9))
    assert [workload.name for workload in chosen.workloads()] == [
        "batch 1, T=0.7",
        "batch 1, T=0.7, top-p=0.9",
        "batch 1, T=1",
        "batch 1, T=1, top-p=0.9",
    ]


def test_every_value_of_a_swept_key_makes_an_engine(pair: Path) -> None:
    sweep = (("sampling_c", (0.5, "auto")), ("adaptive", (True, False)))
    options = {"placement": "inline", "backup": "none"}
    chosen = Settings(target=pair, branches=(6, 12), modes=("plain", "saguaro"), sweep=sweep, options=options)
    chosen.check()
    engines = chosen.engines()
    assert len(set(engines)) == 1 + 2 * 4
    assert [engine.name for engine in engines[:4]] == [
        "plain",
        "saguaro K=4 N=6 ranked sampling_c=0.5 adaptive=true",
        "saguaro K=4 N=6 ranked sampling_c=0.5 adaptive=false",
        "saguaro K=4 N=6 ranked sampling_c=auto adaptive=true",
    ]
    told = chosen.order(engines[2], pair, pair / "draft")["llm"]["speculative_config"]
    assert {key: told[key] for key in ("sampling_c", "adaptive", "placement", "backup")} == {
        "sampling_c": 0.5,
        "adaptive": False,
        "placement": "inline",
        "backup": "none",
    }
    assert chosen.to_json()["sweep"] == {"sampling_c": [0.5, "auto"], "adaptive": [True, False]}


def test_forecasts_are_asked_of_saguaro_alone(pair: Path) -> None:
    chosen = Settings(target=pair, forecasts=True, options={"placement": "inline"})
    chosen.check()
    orders = [chosen.order(engine, pair, pair / "draft") for engine in chosen.engines()]
    assert [order["forecasts"] for order in orders] == [False, False, True]


def test_cores_by_default_and_by_choice(pair: Path) -> None:
    default = Settings(target=pair)
    assert (default.target_cores, default.draft_cores, default.cores) == ((0,), (1,), (0, 1))
    assert Settings(target=pair, modes=("plain",)).cores == (0,)
    chosen = Settings(target=pair, core_target=(1, 2), core_draft=(3,))
    assert (chosen.target_cores, chosen.draft_cores, chosen.cores) == ((1, 2), (3,), (1, 2, 3))
    assert Settings(target=pair, core_target=(1,)).draft_cores == (0,)


def test_one_core_is_shared(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "allowed_cores", lambda: (2,))
    assert Settings(target=pair).cores == (2,)
    assert Settings(target=pair).draft_cores == (2,)


def test_what_an_engine_is_told(pair: Path) -> None:
    chosen = Settings(target=pair, k=(4,), options={"placement": "inline"}, batch=(1, 8), prompts=5)
    plain, draft_model, saguaro = (chosen.order(engine, pair, pair / "draft") for engine in chosen.engines())
    assert "speculative_config" not in plain["llm"]
    assert plain["llm"]["max_num_seqs"] == 8
    assert len(plain["prompts"]) == 5
    assert draft_model["llm"]["speculative_config"] == {
        "method": "draft_model",
        "model": str(pair / "draft"),
        "num_speculative_tokens": 4,
        "draft_sample_method": "greedy",
    }
    assert (draft_model["cores"], draft_model["threads"]) == ([0], 1)
    assert saguaro["llm"]["speculative_config"] == {
        "method": "saguaro",
        "model": str(pair / "draft"),
        "num_speculative_tokens": 4,
        "draft_sample_method": "coupled",
        "branches": "auto",
        "fan_out": "ranked",
        "draft_cpus": "1",
        "placement": "inline",
    }
    assert (saguaro["cores"], saguaro["threads"]) == ([0, 1], None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": Path("/nowhere")}, "does not exist"),
        ({"prompts": 31}, "holds 30: write fewer"),
        ({"prompts": 0}, "--prompts must be at least 1"),
        ({"tokens": 1023}, "does not fit into .* positions: write fewer"),
        ({"core_draft": (7,)}, "no processor core 7 on this machine: write cores from 0 to "),
        ({"top_p": (1.0, 0.0)}, "--top-p must be above 0 and at most 1, not 0"),
        ({"top_p": (1.5,)}, "not 1.5"),
        ({"sweep": (("x", (1,)),), "options": {"x": 2}}, "x is given with --option and with --sweep"),
        ({"sweep": (("x", (1,)), ("x", (2,)))}, "--sweep x is given twice"),
        ({"sweep": (("branches", (6, 12)),)}, "write --branches"),
        ({"forecasts": True}, "add --option placement=inline"),
        ({"forecasts": True, "sweep": (("placement", ("inline", "process")),)}, "add --option placement=inline"),
        ({"forecasts": True, "modes": ("plain",)}, "add saguaro to --modes"),
    ],
)
def test_what_cannot_work_is_refused_at_once(pair: Path, change: dict[str, object], complaint: str) -> None:
    Settings(target=pair).check()
    with pytest.raises(SettingsError, match=complaint):
        Settings(**{"target": pair, **change}).check()  # type: ignore[arg-type]


def test_settings_are_written_without_the_place_of_the_project() -> None:
    written = Settings(draft=Path("/somewhere/else/target/draft")).to_json()
    assert written["target"] == "assets/pair/target"
    assert written["draft"] == ".../target/draft"
    assert written["k"] == [4]
    json.dumps(written)


def test_run_is_the_default_command() -> None:
    assert bench.with_command(["--k", "4"]) == ["run", "--k", "4"]
    assert bench.with_command([]) == ["run"]
    assert bench.with_command(["compare", "a", "b"]) == ["compare", "a", "b"]
    assert bench.with_command(["--help"]) == ["--help"]


def test_options_become_settings() -> None:
    words = (
        "--k 3 4 4 --branches 6 --temperature 0 1 --option placement=inline --option x=2 --core-draft 1-2 --eager "
        "--top-p 1 0.9 --sweep y=0.25,auto,0.25 --sweep z=true,null --forecasts"
    )
    chosen = options.settings_from(bench.parser().parse_args(bench.with_command(words.split())))
    assert chosen == Settings(
        k=(3, 4),
        branches=(6,),
        temperature=(0.0, 1.0),
        top_p=(1.0, 0.9),
        options={"placement": "inline", "x": 2},
        sweep=(("y", (0.25, "auto")), ("z", (True, None))),
        forecasts=True,
        core_draft=(1, 2),
        eager=True,
    )


def test_options_that_cannot_be_read() -> None:
    assert options.cores("0,2-3") == (0, 2, 3)
    assert options.depths("24:6") == (24, 6)
    wrong = ((options.cores, "x"), (options.depths, "24"), (options.key_value, "inline"), (options.key_values, "x"))
    for read, text in (*wrong, (options.key_values, "x=1,,2"), (options.key_values, "x=[1]")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"^bench\.py: this file has format None"):
        bench.main(["compare", str(path), str(path)])


def test_provenance_says_which_processor() -> None:
    cpuinfo = (
        "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Some Processor\n"
        "flags\t\t: fpu avx2 amx_bf16\nprocessor\t: 1\nmodel name\t: Not This One\n"
    )
    found = provenance.processor(cpuinfo)
    assert found["model"] == "Some Processor"
    assert found["family_model"] == "6/143"
    assert found["flags"] == ["avx2", "amx_bf16"]


def test_provenance_says_what_was_typed_and_installed() -> None:
    words = [f"{ROOT}/scripts/bench.py", "--option", "a=b c"]
    assert provenance.command(words) == "python scripts/bench.py --option 'a=b c'"
    for program in ("/somewhere/bin/vllm-saguaro", f"{ROOT}/vllm_saguaro/cli/__main__.py"):
        assert provenance.command([program, "bench", "--k", "3"]) == "vllm-saguaro bench --k 3"
    assert provenance.versions().keys() == {"python", "torch", "vllm", "transformers", "vllm-saguaro"}
    assert provenance.versions()["vllm-saguaro"] is not None


def test_a_busy_machine_is_warned_about() -> None:
    about = {"cores_used": [0, 1], "busy_before": 0.4}
    assert provenance.warnings(about) == [
        "other processes used 40% of core 0, 1 before the start: the times will be too long"
    ]
    assert provenance.warnings({**about, "busy_before": 0.01}) == []
