#!/usr/bin/env bash
# Run the model, data and training tests with the oldest and the newest versions that requirements.txt allows, and print a
# table: `bash tests/versions.sh [floor] [newest] [pytest options]`. The environments are layers over the main one, in
# .venv-floor and .venv-newest; making them takes some minutes and 4 GB each.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
exec python3 tests/versions.py "$@"
