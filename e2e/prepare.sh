# shellcheck shell=bash
# Sourced by run.sh and lmcache.sh: stock vLLM and the model (setup.sh), the node's binary, and the
# Python package unpacked. Sets KVAR_E2E_PYTHON, KVAR_E2E_MODEL, KVAR_BIN and `overlay`.
#
#   KVAR_BIN=PATH            a kvar binary that is built already (default: built here, release)
#   CARGO_TARGET_DIR=PATH    as for cargo
#
# Whoever sources it has `here` (this folder), `root`, `say` for what takes a while, and `set -e`.

settings=$("$here/setup.sh")
eval "$settings"

command -v cargo >/dev/null || { say "no cargo found: install Rust (see README.md)"; exit 1; }
target=${CARGO_TARGET_DIR:-$root/target}
if [ -z "${KVAR_BIN:-}" ]; then
  say "building the node"
  (cd "$root" && cargo build --release --locked -p kvar)
  KVAR_BIN=$target/release/kvar
fi
[ -x "$KVAR_BIN" ] || { say "KVAR_BIN=$KVAR_BIN is no program: build it with 'cargo build --release -p kvar'"; exit 1; }

say "building the Python wheel"
overlay=$here/out/overlay
rm -rf "$here/out/wheel" "$overlay"
mkdir -p "$here/out/wheel" "$overlay"
(cd "$root/python" && "$KVAR_E2E_PYTHON" -m maturin build --release --locked \
  --interpreter "$KVAR_E2E_PYTHON" --out "$here/out/wheel") >"$here/out/maturin.log" 2>&1 ||
  { cat "$here/out/maturin.log" >&2; say "the wheel does not build"; exit 1; }
"$KVAR_E2E_PYTHON" -m pip --disable-pip-version-check --no-input install --quiet --no-deps \
  --no-index --target "$overlay" "$here"/out/wheel/kvar-*.whl
