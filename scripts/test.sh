#!/usr/bin/env bash
# Makes .venv if it is missing, installs what is needed, then runs every check: style, format, types, all tests but
# those marked long.
#   scripts/test.sh            everything, in three lanes beside each other: one starts engines and waits much
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
  # Engines that load and drafts that come back leave cores idle. The other lanes take what is idle and little more: they
  # have one thread a process, and a low priority, so that what a draft has ready in time is nearly what it has on a
  # machine of its own. What starts a Ray is in one lane, since those tests look at what a Ray leaves.
  rays=(tests/unit/placement/test_ray_channel.py tests/unit/placement/test_ray_pool.py)
  lane() {
    local name="$1"
    shift
    run "$@" 2>&1 | sed -u "s/^/$name: /"
  }
  lane engines python -m pytest tests/e2e "${rays[@]}" &
  lanes=($!)
  others=(tests/exactness tests/v2 tests/unit/scripts tests/unit/simulation tests/unit/tuning tests/unit/vllm_hooks)
  lane "units  " nice -n 10 env OMP_NUM_THREADS=1 python -m pytest tests/unit "${rays[@]/#/--ignore=}" \
    "${others[@]/#/--ignore=}" &
  lanes+=($!)
  lane "others " nice -n 10 env OMP_NUM_THREADS=1 python -m pytest "${others[@]}" &
  lanes+=($!)
  failed=0
  for each in "${lanes[@]}"; do wait "$each" || failed=1; done
  exit "$failed"
fi
