#!/usr/bin/env bash
# All tests, in an environment that is made when there is none; words are passed on to pytest.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
exec python3 -m pytest "$@"
