#!/usr/bin/env bash
# Makes .venv if it is missing, installs what is needed, then runs every check: style, format, types, all tests but
# those marked long.
#   scripts/test.sh            everything: the slow tests, which wait much, beside the quick ones
#   scripts/test.sh --fast     without the tests marked slow
#   scripts/test.sh -k cache   what follows goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"

run() { echo "== $*" >&2; "$@"; }
run ruff check .
run ruff format --check .
run mypy
# "python -m" puts the project's root on the path, where the tests find scripts/.
if [ "${1:-}" = --fast ]; then
  shift
  run python -m pytest -m "not slow and not long" "$@"
elif [ $# -gt 0 ]; then
  run python -m pytest "$@"
else
  # Engines that load and drafts that come back leave cores idle. The quick tests take those, and no more: with two
  # threads each, engines and tests would wait for each other in turns of the scheduler.
  (run python -m pytest -m "slow and not long" 2>&1 | sed -u "s/^/slow:  /") &
  slow=$!
  quick=0
  (run env OMP_NUM_THREADS=1 nice -n 5 python -m pytest -m "not slow and not long" 2>&1 | sed -u "s/^/quick: /") || quick=$?
  wait "$slow"
  exit "$quick"
fi
