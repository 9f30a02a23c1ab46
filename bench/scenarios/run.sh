#!/usr/bin/env bash
# One scenario from nothing: stock vLLM and the model (e2e/setup.sh), the node's binary, the Python
# package, then scenario.py. The first argument names the scenario; the others go to scenario.py.
#
#   KVAR_BIN=PATH            a kvar binary that is built already (default: built here, release)
#   CARGO_TARGET_DIR=PATH    as for cargo
#   MODEL=...                another model (with --chat-template and --engine-arguments as it needs)
set -euo pipefail

scenarios=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$scenarios")")
here=$root/e2e
say() { echo "scenarios: $*" >&2; }

# shellcheck source=../../e2e/prepare.sh
source "$here/prepare.sh"

own=()
[ -n "${MODEL:-}" ] || own=(--chat-template "$scenarios/chat.jinja")
PYTHONPATH=$here:$overlay exec "$KVAR_E2E_PYTHON" "$scenarios/scenario.py" "$@" --kvar "$KVAR_BIN" \
  --overlay "$overlay" --model "${MODEL:-$KVAR_E2E_MODEL}" "${own[@]}"
