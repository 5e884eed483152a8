#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# timm 1.0.31 with torch 2.14.1: torch's own conversion to SyncBatchNorm removes a network's activations, in silence.
#
# Expected: torch.nn.SyncBatchNorm.convert_sync_batchnorm changes how statistics are made and nothing else; in eval
# mode, where no statistics are made, the network computes what it did.
# Seen: timm's MobileNet, EfficientNet and RegNet keep their activation inside a BatchNorm2d of their own
# (BatchNormAct2d), which torch takes for a plain BatchNorm2d: all 35 ReLU6 of mobilenetv2_100 are still in the list
# of modules, none is called, and the output is another one by orders of magnitude. No warning; weights and state_dict
# are unchanged. timm has a conversion of its own.
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
calls = []


def output(network):
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    return network(images).abs().max().item(), len(calls)


keys = set(network.state_dict())
largest, count = output(network)
network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()
then, left = output(network)
print(f"ReLU6 calls: {count} before, {left} after; largest output {largest:.3g} before, {then:.3g} after")
assert (count, left, set(network.state_dict()) == keys) == (35, 0, True)
assert then > 100 * largest
PYTHON
