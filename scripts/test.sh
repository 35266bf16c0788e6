#!/usr/bin/env bash
# Makes .venv if it is missing, installs what is needed, then runs every check: style, format, types, all tests but
# those marked long.
#   scripts/test.sh            everything, in two lanes beside each other: one starts engines and waits much
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
  # Engines that load and drafts that come back leave cores idle. The other lane takes those: with two
  # threads each, engines and tests would wait for each other in turns of the scheduler. What starts a Ray is in one
  # lane, since those tests look at what a Ray leaves.
  rays=(tests/unit/placement/test_ray_channel.py tests/unit/placement/test_ray_pool.py)
  (run python -m pytest tests/e2e "${rays[@]}" 2>&1 | sed -u "s/^/engines: /") &
  engines=$!
  others=0
  (run env OMP_NUM_THREADS=1 python -m pytest "${rays[@]/#/--ignore=}" --ignore=tests/e2e 2>&1 |
    sed -u "s/^/others:  /") || others=$?
  wait "$engines"
  exit "$others"
fi
