from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from vllm_saguaro.benchmark.served.options import settings_from
from vllm_saguaro.benchmark.served.settings import Settings, server
from vllm_saguaro.benchmark.settings import SettingsError
from vllm_saguaro.cli import bench_command
from vllm_saguaro.cli.main import parser


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("http://localhost:8000", "localhost:8000", "http://localhost:8000"),
        ("localhost:8000/", "localhost:8000", "http://localhost:8000"),
        ("plain=http://localhost:8000/v1", "plain", "http://localhost:8000"),
        ("a=https://host/under/v1/", "a", "https://host/under"),
    ],
)
def test_a_server_has_a_name_and_an_address(text: str, name: str, url: str) -> None:
    assert server(text) == (name, url)


@pytest.mark.parametrize("text", ["", "ftp://host", "a=", "http://host:port", "http://host/?x=1"])
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write one like http://localhost:8000"):
        server(text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dataset_path": Path("nothing.jsonl")}, "name the prompts with --dataset-path"),
        ({"prompts": 0}, "--prompts must be at least 1, not 0"),
        ({"concurrency": (0,)}, "--concurrency must be at least 1, not 0"),
        ({"concurrency": (25,)}, "write more --prompts"),
        ({"temperature": (-1.0,)}, "--temperature must be at least 0, not -1"),
        ({"timeout": 0.0}, "--timeout must be more than 0"),
        ({"servers": (("a", "http://x"), ("a", "http://y"))}, 'two servers are called "a"'),
        ({"prompts": 1000}, "--prompts 1000: .* holds 96: write fewer"),
        ({"category": "qa"}, "add --dataset spec_bench"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], complaint: str) -> None:
    Settings((("a", "http://x"),)).check()
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(Settings((("a", "http://x"),)), **changes).check()


def test_it_is_a_settings_error_where_no_file_is_to_blame() -> None:
    with pytest.raises(SettingsError):
        Settings((), repetitions=0).check()


def test_options_become_settings() -> None:
    words = "--against-server plain=http://a:1 b:2 --concurrency 1 4 4 --temperature 0 1 --model m --prefix-cache"
    given = bench_command.with_part(words.split())
    assert settings_from(parser().parse_args(["bench", *given])) == Settings(
        (("plain", "http://a:1"), ("b:2", "http://b:2")),
        concurrency=(1, 4),
        temperature=(0.0, 1.0),
        model="m",
        prefix_cache=True,
    )


def test_passwords_are_not_written() -> None:
    written = Settings((("a", "http://user:secret@host:1"),)).to_json()
    assert written["servers"] == {"a": "http://host:1"}
    assert "secret" not in str(written)
