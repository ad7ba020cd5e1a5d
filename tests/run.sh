#!/usr/bin/env bash
# Run all tests, a process per core: `bash tests/run.sh [--fast] [pytest options]`. Makes the environment if there is none.
# --fast runs what plain `pytest` runs: no ranks, compilation, stress, end-to-end or GPU tests; 2 minutes on 2 cores.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # every core has its own process
selection=(-m "") # all markers; pyproject.toml selects the fast tests
if [[ ${1:-} == --fast ]]; then
    selection=()
    shift
fi
# A file stays on one worker (its fixtures are made once); conftest.py has put the longest files first.
exec python3 -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
