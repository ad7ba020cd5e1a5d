#!/usr/bin/env bash
# All tests, a process a core, in an environment that is made when there is none; words are passed on to pytest.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the cores are taken
exec python3 -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
