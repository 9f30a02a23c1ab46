#!/usr/bin/env bash
# Builds, or finds ready, what the end-to-end run stands on: stock vLLM for the CPU and a real
# small model. Nothing of it lies in the source tree:
#
#   ${XDG_CACHE_HOME:-~/.cache}/kvar/e2e-HASH/      HASH = of requirements.lock and this script
#       venv/        stock vLLM 0.32 (CPU) and matplotlib, about 6.6 GB
#       model/       gemma-3-270m as bfloat16 safetensors, 0.55 GB
#       complete     written last: without it everything is built again
#
# Prints two lines for `eval` on standard output, all else goes to standard error:
#   KVAR_E2E_PYTHON=/...   KVAR_E2E_MODEL=/...
# Two runs at once are safe: the second waits for the first and finds its work done.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "e2e set-up: $*" >&2; }
fail() { say "$*"; exit 1; }

# Room for the environment, the model, and the wheels while pip unpacks them.
free_gib_wanted=11

python=${KVAR_PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found: install Python 3.11 or newer, or name one in KVAR_PYTHON"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$python" --version) does not fit: the pinned wheels exist for Python 3.11 to 3.13; name one in KVAR_PYTHON"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module: install it (Debian: python3-venv)"
command -v flock >/dev/null || fail "no flock found: install util-linux"

hash=$(cat "$here/requirements.lock" "$here/make_model.py" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvar
root=$cache/e2e-$hash
mkdir -p "$cache"

exec 9>"$root.lock"
flock -n 9 || { say "another run is building $root; waiting for it"; flock 9; }

if [ ! -f "$root/complete" ]; then
  free_gib=$(df --output=avail -B1G "$cache" | tail -n 1 | tr -d ' ')
  [ "$free_gib" -ge "$free_gib_wanted" ] ||
    fail "$free_gib GiB free under $cache, $free_gib_wanted needed: free some, or point XDG_CACHE_HOME elsewhere"
  for old in "$cache"/e2e-*/; do
    [ -d "$old" ] && [ "$old" != "$root/" ] && say "note: $old is of another version and may be deleted"
  done
  say "building $root (once; 4 to 8 minutes, about 2.5 GB to download)"
  started=$SECONDS
  rm -rf "$root"
  mkdir -p "$root/model"
  "$python" -m venv "$root/venv"
  pip=("$root/venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-cache-dir)
  say "1/3 torch ($((SECONDS - started)) s)"
  "${pip[@]}" --constraint "$here/requirements.lock" "torch==2.13.0" >&2
  say "2/3 vLLM and what it imports ($((SECONDS - started)) s)"
  "${pip[@]}" --no-deps --requirement "$here/requirements.lock" >&2
  say "3/3 the model ($((SECONDS - started)) s)"
  HF_HUB_OFFLINE=1 "$root/venv/bin/python" "$here/make_model.py" "$root/model" >"$root/model.log" 2>&1 ||
    { tail -n 20 "$root/model.log" >&2; fail "the model could not be made; the whole log is $root/model.log"; }
  "$root/venv/bin/python" -c 'import vllm' >/dev/null 2>"$root/import.log" ||
    { tail -n 20 "$root/import.log" >&2; fail "vLLM does not import; the whole log is $root/import.log"; }
  date -u +%FT%TZ >"$root/complete"
  say "ready after $((SECONDS - started)) s"
else
  say "found ready: $root"
fi

printf 'KVAR_E2E_PYTHON=%q\n' "$root/venv/bin/python"
printf 'KVAR_E2E_MODEL=%q\n' "$root/model"
