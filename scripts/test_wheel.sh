#!/bin/sh
# Builds the wheel and runs the tests on what is in it.
# usage: scripts/test_wheel.sh [PYTEST ARGUMENTS]
# The wheel is built from the tracked files alone, installed into an environment that sees the packages of
# $VENV but not its editable hymba, and tested in a tree that has no hymba folder.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/${VENV:-.venv}/bin/python
work=$PWD/.cache/wheel
rm -rf "$work"
mkdir -p "$work/source" "$work/tests"

git ls-files -z | xargs -0 tar -cf - | tar -xf - -C "$work/source"
"$python" -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$work/dist" "$work/source"

"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/packages.pth"
"$python" -m pip --python "$work/venv/bin/python" install -qq --disable-pip-version-check --no-deps \
    --ignore-installed "$work"/dist/hymba-*.whl

cp -R "$work/source/." "$work/tests"
rm -rf "$work/tests/hymba"
cd "$work/tests"
"$work/venv/bin/python" - "$site" <<'CHECK'
import sys
from pathlib import Path

import hymba

package = Path(hymba.__file__).parent
assert package.is_relative_to(sys.argv[1]), f"tests would run on {package}, not on the wheel"
CHECK
exec "$work/venv/bin/python" -m pytest -p no:cacheprovider "$@"
