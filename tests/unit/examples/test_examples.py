"""The examples say what vLLM and the plugin understand. None is run with a real engine here."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from examples import client, offline
from tests.unit.docs import doc_commands
from tests.unit.docs.doc_commands import check_command, check_python
from tests.unit.docs.doc_pages import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
COMPOSE = yaml.safe_load((EXAMPLES / "docker" / "docker-compose.yaml").read_text(encoding="utf-8"))
MANIFESTS = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (EXAMPLES / "kubernetes").glob("*.yaml")
}


def name(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


def filled(text: str) -> str:
    """A value of the compose file where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def run_script(script: str, *words: str, folder: Path, **variables: str) -> list[list[str]]:
    """The commands that a script ends in, with `vllm` and `ray` replaced by something that writes down its words."""
    log = folder / "log"
    for program in ("vllm", "ray"):
        stand_in = folder / program
        stand_in.write_text(
            f'#!{sys.executable}\nimport json, sys\nopen({str(log)!r}, "a").write(json.dumps(sys.argv) + "\\n")\n'
        )
        stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    subprocess.run([EXAMPLES / script, *words], env=environment, check=True, timeout=60, cwd=folder)
    return [[Path(argv[0]).name, *argv[1:]] for argv in map(json.loads, log.read_text().splitlines())]


@pytest.fixture(scope="module")
def serve_parser() -> argparse.ArgumentParser:
    return doc_commands.serve_parser()


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_every_script_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("variables", "words", "speculation"),
    [
        ({}, [], "saguaro"),
        ({"MODEL": "M"}, ["--port", "8001"], "saguaro"),
        ({"MODEL": "M", "DRAFT": "D"}, [], '{"method": "saguaro", "model": "D"}'),
    ],
)
def test_the_server_is_started_as_asked(
    variables: dict[str, str],
    words: list[str],
    speculation: str,
    tmp_path: Path,
    serve_parser: argparse.ArgumentParser,
) -> None:
    (command,) = run_script("server.sh", *words, folder=tmp_path, **variables)
    model = variables.get("MODEL", "assets/pair/target")
    assert command == ["vllm", "serve", model, "--speculative-config", speculation, *words]
    check_command(command, lambda: serve_parser)


def test_the_draft_goes_to_its_node_of_the_cluster(tmp_path: Path, serve_parser: argparse.ArgumentParser) -> None:
    (served,) = run_script("ray_cluster.sh", "serve", folder=tmp_path, MODEL="M", DRAFT="D")
    check_command(served, lambda: serve_parser)
    asked = json.loads(served[served.index("--speculative-config") + 1])
    assert (asked["model"], asked["placement"]) == ("D", "ray")
    *_, joined = run_script("ray_cluster.sh", "draft", "head", folder=tmp_path)
    assert joined[:3] == ["ray", "start", "--address=head:6379"]
    (resources,) = (word.partition("=")[2] for word in joined if word.startswith("--resources="))
    assert json.loads(resources) == asked["ray_options"]["resources"]
    *_, headed = run_script("ray_cluster.sh", "head", folder=tmp_path)
    assert headed == ["ray", "start", "--head", "--port=6379"]


@pytest.mark.parametrize("words", [[], ["tail"], ["draft"], ["serve"]])
def test_a_wrong_word_for_the_cluster_ends_it(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_script("ray_cluster.sh", *words, folder=tmp_path)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=name)
def test_every_python_example_compiles(path: Path) -> None:
    check_python(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("draft", [None, "D"])
def test_the_offline_example_asks_for_the_method(draft: str | None) -> None:
    asked = offline.speculative_config(draft)
    doc_commands.check_speculation(asked)
    assert asked == {"method": "saguaro"} | ({"model": "D"} if draft else {})
    assert Path(offline.parser().parse_args([]).model, "config.json").is_file()


def test_the_client_adds_up_a_counter_over_its_labels() -> None:
    exposition = (
        "# HELP vllm:saguaro_hits_total hits\n"
        'vllm:saguaro_hits_total{model_name="m"} 12.0\n'
        'vllm:saguaro_misses_total{cause="late",model_name="m"} 2.0\n'
        'vllm:saguaro_misses_total{cause="absent",model_name="m"} 3.0\n'
        'vllm:saguaro_misses_created{cause="late"} 1e9\n'
    )
    assert client.total(exposition, "vllm:saguaro_hits") == 12
    assert client.total(exposition, "vllm:saguaro_misses") == 5
    assert client.total(exposition, "vllm:saguaro_backups") == 0


def test_the_compose_file_starts_what_vllm_understands(serve_parser: argparse.ArgumentParser) -> None:
    service = COMPOSE["services"]["saguaro"]
    check_command(["vllm", "serve", *map(filled, service["command"])], lambda: serve_parser)
    context = EXAMPLES / "docker" / service["build"]["context"]
    assert (context / service["build"]["dockerfile"]).samefile(EXAMPLES / "docker" / "Dockerfile")
    assert {volume.partition(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])


def test_the_image_is_made_of_files_that_are_there(serve_parser: argparse.ArgumentParser) -> None:
    text = (EXAMPLES / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lists = {kind: json.loads(words) for kind, words in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)}
    assert lists["ENTRYPOINT"] == ["vllm", "serve"]
    check_command([*lists["ENTRYPOINT"], *lists["CMD"]], lambda: serve_parser)
    assert (ROOT / lists["CMD"][0] / "config.json").is_file()
    assert "RUN PIP_NO_CACHE_DIR=1 scripts/install.sh" in text


def test_the_manifests_belong_together(serve_parser: argparse.ArgumentParser) -> None:
    listed = MANIFESTS["kustomization.yaml"]["resources"]
    assert sorted(listed) == sorted(set(MANIFESTS) - {"kustomization.yaml"})
    deployment, service, claim = (MANIFESTS[f"{each}.yaml"] for each in ("deployment", "service", "cache"))
    pod: dict[str, Any] = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = pod["spec"]["containers"]
    check_command(["vllm", "serve", *container["args"]], lambda: serve_parser)
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= {port["name"] for port in container["ports"]}
    assert {probe["httpGet"]["port"] for key, probe in container.items() if key.endswith("Probe")} == {"http"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
