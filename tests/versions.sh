#!/usr/bin/env bash
# Runs the model, data and LoRA parts of the suite with the oldest and with the newest versions that requirements.txt
# allows and prints a table: `bash tests/versions.sh [floor] [newest] [words for pytest]`. The environments are layers
# over the main one, kept in .venv-floor and .venv-newest: some minutes and 4 GB each the first time.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
exec python3 tests/versions.py "$@"
