# shellcheck shell=bash
# Sourced: a Python environment made from a lock file once, and found ready from then on. Two runs
# at once are safe: the second waits for the first and finds its work done.
#
#   cached_environment NAME LOCK     makes it in ${XDG_CACHE_HOME:-~/.cache}/kvar/NAME-HASH and says
#                                    where in $tools; HASH = of the lock, the interpreter, this file
#   KVAR_PYTHON                      the interpreter (default: python3)
#
# Whoever sources it has `say` for what takes a while, and `set -e`.

cached_environment() {
  local name=$1 lock=$2 python=${KVAR_PYTHON:-python3}
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvar version hash
  version=$("$python" -c 'import platform; print(platform.python_version())')
  hash=$(cat "$lock" "${BASH_SOURCE[0]}" <(echo "$version") | sha256sum | cut -c1-16)
  tools=$cache/$name-$hash
  mkdir -p "$cache"
  exec 9>"$tools.lock"
  flock 9
  if [ ! -f "$tools/complete" ]; then
    say "setting up tools in $tools (once; about a minute)"
    rm -rf "$tools"
    "$python" -m venv "$tools"
    "$tools/bin/python" -m pip --disable-pip-version-check --no-input install --quiet \
      --no-deps --requirement "$lock"
    touch "$tools/complete"
  fi
  exec 9>&-
}
