#!/usr/bin/env bash
# Makes .venv if it is missing, installs what is needed, then runs every check: style, format, types, all tests.
#   scripts/test.sh            everything
#   scripts/test.sh --fast     without the tests marked slow
#   scripts/test.sh -k cache   what follows goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"

selection=()
if [ "${1:-}" = --fast ]; then
  selection=(-m "not slow")
  shift
fi

run() { echo "== $*" >&2; "$@"; }
run ruff check .
run ruff format --check .
run mypy
# "python -m" puts the project's root on the path, where the tests find scripts/.
run python -m pytest "${selection[@]}" "$@"
