#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# safetensors 0.8.0 with NumPy 2.4.6: the same tensors and metadata give other bytes in each process.
#
# Expected: saving is a pure function, so a hash of the file tells whether two checkpoints are the same.
# Seen: the entries of `metadata` are written in an order that differs from process to process.
# Here: fastreid_u compares checksums of a file with that very file's own, never of two files written apart.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
for _ in 1 2 3 4 5 6 7 8; do
    "$temp/venv/bin/python" - <<'PYTHON'
import hashlib

import numpy as np
from safetensors.numpy import save

about = {"epoch": "3", "method": "cluster_contrast", "seed": "1", "data": "market1501"}
print(hashlib.sha256(save({"weight": np.ones(3, np.float32)}, metadata=about)).hexdigest()[:16])
PYTHON
done > "$temp/seen"
files=$(sort -u "$temp/seen" | wc -l)
echo "8 processes wrote $files different files"
[ "$files" -gt 1 ]
