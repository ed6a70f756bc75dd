#!/bin/sh
# Print the path of a Python that has llm_adapt and the given extras, and make it first if there is none.
#
#   scripts/environment.sh EXTRAS        e.g. scripts/environment.sh megatron,dev
#
# - An active virtual environment is used as it is.
# - Else .venv is created. Where the system's Python already has a torch (a vendor's image), .venv sees that torch;
#   otherwise the CPU build named by TORCH is installed from TORCH_INDEX_URL.
# - A torch that is there is pinned while the rest is installed: nothing may replace it.
# - Never needs root; running it again installs only what has changed.
set -eu

extras=$1
here=$(cd "$(dirname "$0")/.." && pwd)
TORCH=${TORCH:-torch==2.13.0}
TORCH_INDEX_URL=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

say() { printf '>> %s\n' "$*" >&2; }
reachable() { "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)' "$1" 2>/dev/null; }
has_torch() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; }

system=${PYTHON:-python3}
command -v "$system" >/dev/null || { say "no $system found; install Python 3.10 or newer, or set PYTHON"; exit 1; }
"$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "$("$system" --version) found; Python 3.10 or newer is needed. Set PYTHON to one, e.g. PYTHON=python3.11"
    exit 1
}

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
else
    python=$here/.venv/bin/python
    if [ ! -x "$python" ]; then
        if has_torch "$system"; then
            say "creating .venv on top of the torch that is installed"
            "$system" -m venv --system-site-packages "$here/.venv"
        else
            say "creating .venv"
            "$system" -m venv "$here/.venv"
        fi
    fi
fi

# What is installed is told by what was asked and by the packaging files.
stamp=$(dirname "$(dirname "$python")")/.llm-adapt-$(printf '%s' "$extras" | tr ',' '-')
wanted=$(cat "$here/setup.py" "$here/pyproject.toml" | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    if ! has_torch "$python"; then
        if reachable "$TORCH_INDEX_URL"; then
            say "installing $TORCH from $TORCH_INDEX_URL (set TORCH and TORCH_INDEX_URL for another build)"
            "$python" -m pip install --quiet --extra-index-url "$TORCH_INDEX_URL" "$TORCH" >&2
        else
            # pip would try each package there five times before it goes on.
            say "$TORCH_INDEX_URL cannot be reached; installing $TORCH from where pip is configured to look"
            "$python" -m pip install --quiet "$TORCH" >&2
        fi
    fi
    constraint=$(mktemp)
    trap 'rm -f "$constraint"' EXIT
    "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$constraint"
    say "installing llm_adapt[$extras] beside $(cat "$constraint")"
    "$python" -m pip install --quiet --constraint "$constraint" --editable "$here[$extras]" >&2
    printf '%s' "$wanted" >"$stamp"
fi
say "using $python"
printf '%s\n' "$python"
