#!/usr/bin/env bash
# The main job on a fresh machine: builds, starts a node on a preallocated file below this folder,
# replays an hour of a real chat service through the real client, prints the report, and goes on
# serving until Ctrl-C. ONCE=1 ends after the report.
#
#   KVAR_DATA   where the data file lies        (default: kvar-data/kvar.data here)
#   KVAR_SIZE   its size                        (default: 4GiB)
#   KVAR_DRAM   memory for blocks               (default: 512MiB)
#   KVAR_BLOCK  bytes a block of the trace      (default: 16KiB; 182,790 blocks, 2.8 GiB)
#   KVAR_LISTEN, KVAR_ADMIN  addresses          (default: 127.0.0.1:7411 and :7412; ONCE=1: free ports)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/tools.sh

data=${KVAR_DATA:-$PWD/kvar-data/kvar.data}
size=${KVAR_SIZE:-4GiB}
dram=${KVAR_DRAM:-512MiB}
block=${KVAR_BLOCK:-16KiB}
if [ "${ONCE:-}" = 1 ]; then listen=${KVAR_LISTEN:-127.0.0.1:0} admin=${KVAR_ADMIN:-127.0.0.1:0}
else listen=${KVAR_LISTEN:-127.0.0.1:7411} admin=${KVAR_ADMIN:-127.0.0.1:7412}; fi

mkdir -p "$(dirname "$data")"
target=${CARGO_TARGET_DIR:-$PWD/target}
# A build takes about 2 GiB, the data file its size (kvar itself says so if that is too much).
free=$(df --output=avail -B1M "$PWD" | tail -n 1 | tr -d ' ')
if [ ! -x "$target/release/kvar" ] && [ "$free" -lt 3072 ]; then
  echo "only $free MiB are free here and building needs about 3072: free some, or set CARGO_TARGET_DIR" >&2
  exit 1
fi
echo "building (some minutes the first time)" >&2
cargo build --release --locked --quiet -p kvar

ready=$(mktemp -u)
node=
finish() {
  trap - EXIT INT TERM
  if [ -n "$node" ] && kill -0 "$node" 2>/dev/null; then
    kill -TERM "$node"
    wait "$node" || true
  fi
  rm -f "$ready"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$target/release/kvar" serve --data "$data" --size "$size" --dram "$dram" --expected-block-bytes "$block" \
  --listen "$listen" --admin "$admin" --ready-file "$ready" &
node=$!
until [ -s "$ready" ]; do
  if ! kill -0 "$node" 2>/dev/null; then
    wait "$node" || exit $?
    exit 1
  fi
  sleep 0.1
done
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$ready"; }
endpoint=$(field listen)

"$target/release/kvar" replay traces/mooncake-conversation.jsonl.zst --endpoint "$endpoint" \
  --key-file "$data.key" --block-bytes "$block"
if [ "${ONCE:-}" = 1 ]; then exit 0; fi
echo
echo "serving on $endpoint; status: http://$(field admin)/v1/status; Ctrl-C ends it" >&2
wait "$node"
