#!/bin/sh
# Prints a folder with the packages of one overlay of constraints.txt; made the first time. For PYTHONPATH:
# usage: PYTHONPATH=$(scripts/overlay.sh oldest) .venv/bin/python -m pytest
set -eu
name=$1
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python

packages=$(sed -n "s/^# overlay $name: //p" constraints.txt)
if [ -z "$packages" ]; then
    echo "error: constraints.txt has no overlay '$name'; it has:" \
         "$(sed -n 's/^# overlay \([a-z]*\): .*/\1/p' constraints.txt | sort -u | tr '\n' ' ')" >&2
    exit 1
fi
# The folder is named after its content, so that a changed pin is a new folder.
target=$PWD/.cache/overlay/$name-$(echo "$packages" | cksum | cut -d ' ' -f 1)
if [ ! -d "$target" ]; then
    mkdir -p .cache/overlay
    rm -rf "$target.part"
    # shellcheck disable=SC2086  # one word per package
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --target "$target.part" $packages >&2
    mv "$target.part" "$target"
fi
echo "$target"
