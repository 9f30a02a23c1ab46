#!/usr/bin/env bash
# Checks the Python package as a whole: lint, types, the wheel, stubs against the compiled module,
# and the tests against a real node.
#
#   KVAR_BIN=PATH            a kvar binary that is built already (default: built here)
#   KVAR_PROFILE=release     how node and wheel are built (default: dev)
#   CARGO_TARGET_DIR=PATH    as for cargo
#
# The tools lie in ${XDG_CACHE_HOME:-~/.cache}/kvar/python-HASH, made anew when the lock changes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
say() { echo "python: $*" >&2; }
fail() { say "$*"; exit 1; }

python=${KVAR_PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found: install Python 3.11 or newer, or name one in KVAR_PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' ||
  fail "$("$python" --version) is too old: Python 3.11 or newer is needed; name one in KVAR_PYTHON"

# shellcheck source=../scripts/environment.sh
source "$root/scripts/environment.sh"
cached_environment python "$here/requirements-dev.lock"

say "lint and types"
cd "$here"
"$tools/bin/ruff" check --quiet . ../e2e ../bench/peers_net ../bench/scenarios ../bench/staging.py
"$tools/bin/ruff" format --check --quiet . ../e2e ../bench/peers_net ../bench/scenarios ../bench/staging.py
"$tools/bin/mypy" --no-error-summary

profile=${KVAR_PROFILE:-dev}
target=${CARGO_TARGET_DIR:-$root/target}
if [ -z "${KVAR_BIN:-}" ]; then
  say "building the node ($profile)"
  (cd "$root" && cargo build --quiet --locked --profile "$profile" -p kvar)
  KVAR_BIN=$target/${profile/dev/debug}/kvar
fi
[ -x "$KVAR_BIN" ] || fail "KVAR_BIN=$KVAR_BIN is no program: build it with 'cargo build -p kvar'"
export KVAR_BIN

say "building the wheel ($profile)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$tools/bin/maturin" build --profile "$profile" --locked --interpreter "$tools/bin/python" --out "$work" \
  >"$work/maturin.log" 2>&1 || { cat "$work/maturin.log" >&2; fail "the wheel does not build"; }
"$tools/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-deps --no-index \
  --target "$work/site" "$work"/kvar-*.whl

say "stubs against the module"
PYTHONPATH=$work/site MYPYPATH=$work/site "$tools/bin/stubtest" kvar._kvar --concise \
  --mypy-config-file "$here/pyproject.toml"

say "tests"
PYTHONPATH=$work/site "$tools/bin/python" -m pytest -q -p no:cacheprovider "$here/tests" "$@"
