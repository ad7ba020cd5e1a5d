#!/usr/bin/env bash
# Run the tests of models, data, planning, LoRA, ZeRO and resuming with other versions of Python and of the libraries, and
# print a table:
#   bash tests/versions.sh                                 all environments of versions.py
#   bash tests/versions.sh floor newest [pytest options]   some of them
#   bash tests/versions.sh PATH/bin/python tests/model     an environment that exists, some tests
# An environment whose Python is not installed is skipped, with a message. They are kept in .venv-NAME; with a torch of
# its own, one takes some minutes to make and 4 to 8 GB.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source shell/setup.sh
exec python3 tests/versions.py "$@"
