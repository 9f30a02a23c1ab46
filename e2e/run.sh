#!/usr/bin/env bash
# The end-to-end run, from nothing: stock vLLM and a real model (setup.sh), the node's binary, the
# Python wheel, then run.py. All arguments go to run.py; `--quick` is the form for CI.
#
#   KVAR_BIN=PATH            a kvar binary that is built already (default: built here, release)
#   CARGO_TARGET_DIR=PATH    as for cargo
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
say() { echo "e2e: $*" >&2; }

source "$here/prepare.sh"

say "testing the connector against real torch"
KVAR_BIN=$KVAR_BIN PYTHONPATH=$overlay "$KVAR_E2E_PYTHON" -m pytest -q -p no:cacheprovider "$root/python/tests"

exec "$KVAR_E2E_PYTHON" "$here/run.py" --kvar "$KVAR_BIN" --model "$KVAR_E2E_MODEL" --overlay "$overlay" "$@"
