# SPDX-License-Identifier: Apache-2.0
"""A run that a version before layout 4 began goes on to the bit."""

import pytest
import torch
from safetensors.torch import load_file

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.engine import checkpoint

TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=8, batch_size=16, num_instances=4, iters=2, epochs=2,
    workers=0, k1=8, k2=3, calibrate_bn=2, eval_step=2, quiet=True, device="cpu",
)  # fmt: skip


def as_layout_3(tensors, kept):
    """What layout 3 had of a state: networks by name, and by ``kept`` the rest under the name that it had."""
    old = {}
    for name, tensor in tensors.items():
        part = name.split(".")[1] if name.startswith("recipe.") else None
        if part is None and name != "readable":
            old[name] = tensor
        elif part in ("model", "teacher"):
            old[name.replace("recipe.", "networks.", 1)] = tensor
        elif name in kept:
            old[kept[name]] = tensor
    return old


@pytest.mark.parametrize(
    ("method", "own", "kept"),
    [
        ("dccc", {}, {"recipe._extra_state": "recipe.steps"}),
        (
            "spcl",
            {"eps_gap": 0.1},
            {
                "recipe.memory.features": "networks.memory.features",
                "recipe.memory.labels": "networks.memory.labels",
                "recipe.labels.bar": "recipe.threshold",
            },
        ),
        (
            "cluster_contrast_uda",
            {"eps_gap": 0.1, "reliability": True},
            {"recipe.memory.features": "recipe.source_rows", "recipe.labels.bar": "recipe.threshold"},
        ),
    ],
)
def test_goes_on_to_the_bit(method, own, kept, tiny_world, tiny_source, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    settings = TINY | own | {"method": method} | ({"source": str(tiny_source)} if method.endswith("uda") else {})
    whole = fastreid_u.train(dataset, logs_dir=tmp_path / "whole", **settings)
    first = fastreid_u.train(dataset, logs_dir=tmp_path / "old", **settings | {"epochs": 1})
    file = first.folder / "state.safetensors"
    tensors, about = checkpoint.read_described(file)
    tensors = as_layout_3(tensors, kept)
    if "recipe.source_rows" in tensors:
        tensors["recipe.source_rows"] = tensors["recipe.source_rows"][:6]  # of the source's people alone
    checkpoint.write_described(file, tensors, about | {"schema": 3})
    resumed = fastreid_u.train(dataset, logs_dir=first.folder, resume=True, **settings)
    ours, theirs = (load_file(run.folder / "state.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
