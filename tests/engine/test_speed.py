# SPDX-License-Identifier: Apache-2.0
"""Layout, batch and precision that are left to the machine."""

import pytest
import torch
from torch import nn

from fastreid_u.config import Config
from fastreid_u.engine import speed
from fastreid_u.engine.display import Display

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("asked", [True, False])
def test_a_layout_that_was_asked_for_stays(asked):
    config = Config(channels_last=asked)
    assert speed.fitted_to_machine(config, CPU) is config


@pytest.mark.parametrize(
    ("machine", "device", "expected"), [("x86_64", CPU, True), ("x86_64", GPU, False), ("riscv64", CPU, False)]
)
def test_the_layout_is_decided_by_the_machine(machine, device, expected, monkeypatch):
    monkeypatch.setattr(speed.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert Config().channels_last is None
    assert speed.fitted_to_machine(Config(), device).channels_last is expected


def test_batches_of_features():
    assert speed.feature_batch(40, CPU, 256, 128) == 40
    assert speed.feature_batch(None, GPU, 256, 128) == 256
    assert [speed.feature_batch(None, CPU, *size) for size in ((128, 64), (256, 128), (1000, 1000), (8, 8))] == [
        32,
        8,
        8,
        256,
    ]


def test_steps_of_depthwise_networks_are_in_float32(monkeypatch):
    monkeypatch.setattr(speed, "uses_bfloat16", lambda amp, device: amp != "off")
    plain, depthwise = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
    steps = [
        speed.machine_for(Config(amp=amp), CPU, model, Display()).autocast_steps
        for amp, model in (("auto", plain), ("auto", depthwise), ("bf16", depthwise), ("off", plain))
    ]
    assert steps == [True, False, True, False]


def test_the_card_says_what_was_decided():
    machine = speed.Machine(CPU, True, Display(), False)
    line = speed.speed_line(Config(channels_last=True, height=128, width=64), machine)
    assert line == "channels_last, bfloat16 features, float32 steps; features: 32 images a batch, BatchNorm folded"
