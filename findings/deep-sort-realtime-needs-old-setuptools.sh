#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# deep-sort-realtime 1.3.2 with setuptools 84.2.1, NumPy 2.4.6: the appearance model cannot be imported in a fresh
# environment.
#
# Expected: a tracker whose declared requirements are installed can load the Re-ID network that its wheel ships.
# Seen: its embedder imports pkg_resources, which belongs to setuptools and is gone from recent ones (Python 3.12's
# venv has no setuptools at all); setuptools is not among the declared requirements. The tracker itself, without the
# embedder, imports.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps deep-sort-realtime==1.3.2 \
    opencv-python-headless numpy==2.4.6 scipy setuptools==84.2.1
"$temp/venv/bin/python" - > "$temp/seen" <<'PYTHON'
from importlib.metadata import requires

names = ("deepsort_tracker", "embedder.embedder_pytorch")
for name in names:
    try:
        __import__(f"deep_sort_realtime.{name}")
        print(name, "imports")
    except ModuleNotFoundError as error:
        print(name, error)
print("setuptools declared:", any("setuptools" in line for line in requires("deep-sort-realtime")))
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
deepsort_tracker imports
embedder.embedder_pytorch No module named 'pkg_resources'
setuptools declared: False
SEEN
