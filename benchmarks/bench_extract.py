# SPDX-License-Identifier: Apache-2.0
"""Features of crops on a CPU: as the library runs a network, beside the plain network in eval mode.

    pytest benchmarks/bench_extract.py --benchmark-only

The pixels are resident, so that the network alone is timed. Features must be the plain network's within 1e-5 before
anything is timed. "plain" is float32, in torch's default layout, 256 images a batch, as published code extracts.
"""

import importlib.util

import pytest
import torch

from fastreid_u.config import Config
from fastreid_u.engine.allocator import keeping_freed_memory
from fastreid_u.engine.speed import feature_batch, fitted_to_machine
from fastreid_u.models import build_model
from fastreid_u.models.folding import folded

CPU = torch.device("cpu")
HEIGHT, WIDTH = 128, 64
IMAGES = {"tiny": 8, "2000": 2_000}
NETWORKS = ("resnet10", "resnet18", "resnet50", "timm/tf_efficientnet_lite0", "timm/mobilenetv2_100")


@torch.no_grad()
def plain(network, images):
    return torch.cat([network(batch) for batch in images.split(256)])


@torch.no_grad()
def ours(network, images):
    """What ``ImageSet.features`` does with a network on a CPU."""
    size = feature_batch(None, CPU, HEIGHT, WIDTH)
    with keeping_freed_memory(CPU):
        if fitted_to_machine(Config(), CPU).channels_last:
            network = network.to(memory_format=torch.channels_last)
            batches = (batch.contiguous(memory_format=torch.channels_last) for batch in images.split(size))
        else:
            batches = iter(images.split(size))
        first = next(batches)
        copy = folded(network, first)
        return torch.cat([copy(first), *(copy(batch) for batch in batches)])


WAYS = {"fastreid_u": ours, "plain": plain}


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.parametrize("name", WAYS)
def bench_extract(benchmark, name, arch, size):
    if torch.cuda.is_available():
        pytest.skip("what it compares is done on a CPU only")
    if arch.startswith("timm/") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install timm")
    images = torch.randn(IMAGES[size], 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    network = build_model(arch, weights=None, seed=0, image_size=(HEIGHT, WIDTH)).eval()
    few = images[:64]
    difference = (ours(network, few) - plain(network.to(memory_format=torch.contiguous_format), few)).abs().max().item()
    assert difference <= 1e-5

    benchmark.group = f"extract, {arch}, {IMAGES[size]} images of {HEIGHT} x {WIDTH}, float32"
    benchmark.pedantic(WAYS[name], args=(network, images), rounds=1 if arch == "resnet50" else 2)
    benchmark.extra_info |= {"difference": difference, "images": IMAGES[size]}
