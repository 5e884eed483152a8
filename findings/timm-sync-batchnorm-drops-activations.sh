#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# timm 1.0.31 with torch 2.14.1: torch's own conversion to SyncBatchNorm removes a network's activations, in silence.
#
# Expected: torch.nn.SyncBatchNorm.convert_sync_batchnorm changes how statistics are made and nothing else; in eval
# mode, where no statistics are made, the network computes what it did.
# Seen: timm's MobileNet, EfficientNet and RegNet keep their activation inside a BatchNorm2d of their own
# (BatchNormAct2d), which torch takes for a plain BatchNorm2d: all 35 ReLU6 of mobilenetv2_100 are gone and the output
# is another one by orders of magnitude. No warning; weights and state_dict are unchanged. timm has a conversion of
# its own.
# Here: group-wise BatchNorm keeps the activation (tests/models/test_batchnorm.py).
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision timm==1.0.31
"$temp/venv/bin/python" - <<'PYTHON'
import timm
import torch

torch.manual_seed(0)
network = timm.create_model("mobilenetv2_100", pretrained=False).eval()
images = torch.randn(2, 3, 64, 64)
activations = sum(isinstance(module, torch.nn.ReLU6) for module in network.modules())
before, keys = network(images), set(network.state_dict())
network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()
after = network(images)
left = sum(isinstance(module, torch.nn.ReLU6) for module in network.modules())
before, after = before.abs().max().item(), after.abs().max().item()
print(f"ReLU6: {activations} before, {left} after; largest output {before:.3g} before, {after:.3g} after")
assert (activations, left, set(network.state_dict()) == keys) == (35, 0, True)
assert after > 100 * before
PYTHON
