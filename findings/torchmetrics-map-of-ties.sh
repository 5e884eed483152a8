#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torchmetrics 1.9.0 with torch 2.14.1: the mAP of equal scores depends on the order of the gallery.
#
# Expected: average precision depends on scores and relevance; copies of one image (frozen video frames) score the
# same.
# Seen: RetrievalMAP gives 1/3 or 1 for the same three equal scores, by whether the match stands last or first in the
# input. Its default also counts a query without a match as 0, where Re-ID's evaluators leave it out: 0.42 against
# 0.83.
# Here: fastreid_u.rank_metrics breaks ties by index too, and offers the mean over ties (ap="sklearn"); queries
# without a match are left out and counted (docs/quirks.md).
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchmetrics==1.9.0
"$temp/venv/bin/python" - > "$temp/seen" <<'PYTHON'
import torch
from torchmetrics.retrieval import RetrievalMAP

scores, match, query = torch.full((3,), 0.5), torch.tensor([False, False, True]), torch.zeros(3, dtype=torch.long)
print(f"match last {RetrievalMAP()(scores, match, indexes=query):.3f}", end=" ")
print(f"first {RetrievalMAP()(scores, match.flip(0), indexes=query):.3f}")
scores = torch.tensor([0.9, 0.8, 0.7, 0.9, 0.8])
match, query = torch.tensor([True, False, True, False, False]), torch.tensor([0, 0, 0, 1, 1])
for rule in ("neg", "skip"):
    print(f"{rule} {RetrievalMAP(empty_target_action=rule)(scores, match, indexes=query):.3f}", end=" ")
print(f"default {RetrievalMAP()(scores, match, indexes=query):.3f}")
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
match last 0.333 first 1.000
neg 0.417 skip 0.833 default 0.417
SEEN
