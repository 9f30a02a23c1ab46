#!/usr/bin/env bash
# Engine against fio, links against plain sockets, the index and its recovery; JSON under bench/results.
# BENCH_ARGS goes to the first two (for example: BENCH_ARGS="--pairs 3 --seconds 1").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v fio >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq fio >/dev/null
  else
    echo "please install fio" >&2
    exit 1
  fi
fi
cargo build --release --locked --quiet -p kvar
kvar=${CARGO_TARGET_DIR:-$PWD/target}/release/kvar
mkdir -p bench/results
# shellcheck disable=SC2086
"$kvar" bench engine --json --plot bench/results/engine.svg ${BENCH_ARGS:-} >bench/results/engine.json
# shellcheck disable=SC2086
"$kvar" bench net --json --plot bench/results/net.svg ${BENCH_ARGS:-} >bench/results/net.json
"$kvar" bench index --json >bench/results/index.json
cat bench/results/{engine,net,index}.json
