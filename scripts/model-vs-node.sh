#!/usr/bin/env bash
# Does a real node keep the blocks that the offline model says it keeps? Starts a node smaller than
# the conversation trace, replays the trace through it, and asks `kvar replay --offline --model
# engine` about the same capacity: DRAM + what the node's segments hold beside the one kept free.
#
#   model-vs-node.sh [SIZE [DRAM]]      default 256MiB 57MiB: about 10 % of the trace at 16 KiB a block
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
size=${1:-256MiB} dram=${2:-57MiB} block=16384
trace=traces/mooncake-conversation.jsonl.zst
cargo build --release --locked --quiet -p kvar
kvar=${CARGO_TARGET_DIR:-$PWD/target}/release/kvar
work=$(mktemp -d)
node=
trap '[ -z "$node" ] || kill "$node" 2>/dev/null; wait; rm -rf "$work"' EXIT
"$kvar" serve --data "$work/data" --size "$size" --dram "$dram" --shards 1 --flash-write-budget 0x --expected-block-bytes "$block" \
  --listen 127.0.0.1:0 --admin 127.0.0.1:0 --log warn --ready-file "$work/ready" &
node=$!
until [ -s "$work/ready" ]; do kill -0 "$node"; sleep 0.1; done
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$work/ready"; }
"$kvar" replay "$trace" --endpoint "$(field listen)" --key-file "$work/data.key" --block-bytes "$block" --json \
  >"$work/node.json"
"$kvar" status --endpoint "$(field listen)" --key-file "$work/data.key" --json >"$work/status.json"
python3 - "$work" "$block" "$kvar" "$trace" <<'P'
import json, pathlib, subprocess, sys
work, block, kvar, trace = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
node = json.loads((work / "node.json").read_text())
status = json.loads((work / "status.json").read_text())
shard = status["shards"][0]["engine"]
dram = shard["dram_bytes_max"] // block
flash = shard["flash_bytes_max"] * (shard["segments"] - 2) // shard["segments"] // block
distinct = 182_790
model = json.loads(subprocess.check_output([
    kvar, "replay", "--offline", trace, "--model", "engine", "--capacity", str(dram + flash),
    "--dram-share", f"{dram / distinct:.6f}", "--block-bytes", str(block), "--json"]))["rows"][0]
difference = 100 * (node["block_hit_rate"] - model["block_hit_rate"])
print(f"{'':8} {'hit rate':>9} {'write amplification':>20}")
for name, row in ("node", node), ("model", model):
    print(f"{name:8} {100 * row['block_hit_rate']:8.2f}% {row['write_amplification']:20.3f}")
print(f"capacity {dram} + {flash} blocks; difference {difference:+.2f} points; wrong bytes {node['wrong_bytes']}")
sys.exit(abs(difference) > 1.0 or node["wrong_bytes"] > 0)
P
