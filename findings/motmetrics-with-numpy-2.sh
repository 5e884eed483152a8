#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# motmetrics 1.4.0 with NumPy 2.4.6: installs without a complaint, but its first overlap of boxes raises.
#
# Expected: `pip install motmetrics` gives a set that can score a tracker (it asks for numpy>=1.12.1, without an upper
# end).
# Seen: iou_matrix, and so every comparison of tracks by overlap, calls numpy.asfarray, which NumPy 2 has removed;
# centre distances work. With numpy<2 it runs.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check motmetrics==1.4.0 numpy==2.4.6
"$temp/venv/bin/python" - > "$temp/seen" <<'PYTHON'
import motmetrics
import numpy as np

boxes = np.array([[0.0, 0.0, 10.0, 20.0]])
print("centres:", motmetrics.distances.norm2squared_matrix(boxes[:, :2], boxes[:, :2] + 1).tolist())
try:
    print("overlap:", motmetrics.distances.iou_matrix(boxes, boxes, max_iou=0.5).tolist())
except AttributeError as error:
    print("overlap: AttributeError,", str(error).split(".")[0] + "." + str(error).split(".")[1])
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
centres: [[2.0]]
overlap: AttributeError, `np.asfarray` was removed in the NumPy 2
SEEN
