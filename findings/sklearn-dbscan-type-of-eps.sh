#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# scikit-learn 1.9.1 with NumPy 2.4.6: DBSCAN on a ready distance matrix compares with eps in the matrix's own
# precision.
#
# Expected: two points whose distance was written as 0.6 are within eps = 0.6 of each other, whatever the types.
# Seen: it depends on the types of both. A Python float is rounded to the matrix's type first, but not from float16; a
# numpy.float64, which is what numpy.linspace(...) and numpy.percentile(...) give, is not rounded, so a sweep over eps
# labels float32 distances otherwise than the same number typed by hand.
# Here: fastreid_u.dbscan rounds eps to float32 whatever its type (docs/quirks.md).
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6
"$temp/venv/bin/python" - > "$temp/seen" <<'PYTHON'
import numpy as np
from sklearn.cluster import DBSCAN

for matrix in (np.float16, np.float32, np.float64):
    distances = np.array([[0, 0.6], [0.6, 0]], dtype=matrix)
    for number in (float, np.float32, np.float64):
        labels = DBSCAN(eps=number(0.6), min_samples=2, metric="precomputed").fit_predict(distances)
        print(f"distances {matrix.__name__:8} eps {number.__name__:8} labels {labels.tolist()}")
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
distances float16  eps float    labels [-1, -1]
distances float16  eps float32  labels [-1, -1]
distances float16  eps float64  labels [-1, -1]
distances float32  eps float    labels [0, 0]
distances float32  eps float32  labels [0, 0]
distances float32  eps float64  labels [-1, -1]
distances float64  eps float    labels [0, 0]
distances float64  eps float32  labels [0, 0]
distances float64  eps float64  labels [0, 0]
SEEN
