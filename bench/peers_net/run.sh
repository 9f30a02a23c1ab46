#!/usr/bin/env bash
# kvar beside Mooncake Store (over TCP, with its master) and Redis: same machine, same run, same
# sizes, in turns. Arguments go to run.py (--help says which).
#
#   KVAR_BIN=PATH            a kvar binary that is built already (default: built here, release)
#   CARGO_TARGET_DIR=PATH    as for cargo
#
# Mooncake listens on all addresses without asking who is there, so all of it runs in a network
# namespace of its own (needs root). Tools lie in ${XDG_CACHE_HOME:-~/.cache}/kvar/peers-HASH.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
say() { echo "peers: $*" >&2; }
fail() { say "$*"; exit 1; }

[ "$(id -u)" = 0 ] || fail "a network namespace needs root: run this as root"
if ! command -v redis-server >/dev/null || ! command -v redis-benchmark >/dev/null; then
  command -v apt-get >/dev/null || fail "please install redis-server and redis-benchmark"
  say "installing redis"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server redis-tools >/dev/null
fi

# shellcheck source=../../scripts/environment.sh
source "$root/scripts/environment.sh"
cached_environment peers "$here/requirements.lock"

target=${CARGO_TARGET_DIR:-$root/target}
if [ -z "${KVAR_BIN:-}" ]; then
  say "building the node"
  (cd "$root" && cargo build --release --quiet --locked -p kvar)
  KVAR_BIN=$target/release/kvar
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "building the Python wheel"
(cd "$root/python" && "$tools/bin/maturin" build --release --locked --interpreter "$tools/bin/python" \
  --out "$work") >"$work/maturin.log" 2>&1 || { cat "$work/maturin.log" >&2; fail "the wheel does not build"; }
"$tools/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-deps --no-index \
  --target "$work/site" "$work"/kvar-*.whl

# Mooncake wants an address that is not loopback's; what is sent to it stays on the machine all the same.
net='ip link set lo up && ip link add lan0 type veth peer name lan1 && ip addr add 10.77.0.1/24 dev lan0 &&
  ip link set lan0 up && ip link set lan1 up && exec "$@"'
PYTHONPATH=$work/site unshare --net --pid --fork --kill-child --mount-proc bash -c "$net" _ \
  "$tools/bin/python" "$here/run.py" --kvar "$KVAR_BIN" --tools "$tools/bin" --work "$work" "$@"
