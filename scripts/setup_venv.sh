#!/bin/sh
# Makes or completes a virtual environment with this checkout in it, at the versions of constraints.txt.
# usage: scripts/setup_venv.sh VENV [EXTRAS]     e.g.  scripts/setup_venv.sh .venv '[dev]'
# The interpreter is the first of python3, python3.13, ... that is new enough; PYTHON=/path names another.
set -eu
venv=$1
extras=${2-}
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
complete() { new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

if ! complete; then
    python=
    seen=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
        version=$("$candidate" --version 2>&1) && seen="$seen $candidate is $version;"
    done
    if [ -z "$python" ]; then
        echo "error: hymba needs Python 3.11 or newer, and found none:${seen:- no python at all;}" \
             "install one, or name it with PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        echo "error: VENV=$venv is not empty and not a virtual environment: remove it or name another VENV" >&2
        exit 1
    fi
    # --clear: what is there is half made, or its interpreter is gone.
    "$python" -m venv --clear "$venv"
fi

echo "Installing hymba$extras into $venv (the first time downloads PyTorch)"
# One build tool at a pinned version instead of a new download for each isolated build.
pip="$venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt"
$pip setuptools
$pip --no-build-isolation --editable ".$extras"
