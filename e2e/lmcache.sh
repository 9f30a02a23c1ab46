#!/usr/bin/env bash
# The LMCache door, from nothing. `run`: stock vLLM over the real LMCache server over a node, all of
# it killed and restarted. `bench`: `lmcache bench l2` on kvar and on LMCache's own fs_native, in
# turns. `compare`: times to the first token of vLLM over kvar and of vLLM over LMCache with its own files.
# What follows goes to lmcache_run.py, lmcache_bench.py or lmcache_compare.py (--help says which arguments).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
say() { echo "lmcache: $*" >&2; }
what=${1:-run}
case $what in run | bench | compare) shift || true ;; *) say "no $what here: run, bench or compare"; exit 2 ;; esac

source "$here/prepare.sh"
source "$root/scripts/environment.sh"
KVAR_PYTHON=$KVAR_E2E_PYTHON cached_environment lmcache "$here/lmcache.lock"
paths=$overlay:$(echo "$tools"/lib/python3.*/site-packages)

if [ "$what" = run ]; then
  say "testing the door under LMCache's own adapter"
  KVAR_NEEDS_LMCACHE=1 KVAR_BIN=$KVAR_BIN PYTHONPATH=$paths "$KVAR_E2E_PYTHON" -m pytest -q -p no:cacheprovider \
    "$root/python/tests/test_lmcache.py"
  PYTHONPATH=$overlay exec "$KVAR_E2E_PYTHON" "$here/lmcache_run.py" --kvar "$KVAR_BIN" \
    --model "$KVAR_E2E_MODEL" --overlay "$paths" "$@"
fi
if [ "$what" = compare ]; then
  PYTHONPATH=$overlay exec "$KVAR_E2E_PYTHON" "$here/lmcache_compare.py" --kvar "$KVAR_BIN" \
    --model "$KVAR_E2E_MODEL" --overlay "$paths" "$@"
fi
exec "$KVAR_E2E_PYTHON" "$here/lmcache_bench.py" --kvar "$KVAR_BIN" --overlay "$paths" "$@"
