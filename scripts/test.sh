#!/usr/bin/env bash
# Every test but the engines': Rust (with cargo-nextest where it is installed, else cargo test),
# doc tests, and the Python package against a real node.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --workspace --locked --no-fail-fast
else
  cargo test --workspace --locked --no-fail-fast --lib --bins --tests
fi
cargo test --workspace --locked --doc --quiet
KVAR_PROFILE=dev python/check.sh
