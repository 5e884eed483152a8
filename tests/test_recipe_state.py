# SPDX-License-Identifier: Apache-2.0
"""Saved and restored between any two steps, every method goes on as if nothing had happened, to the bit."""

import importlib.util
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from fastreid_u.draws import Draws
from fastreid_u.models.neck import bnneck
from fastreid_u.models.pooling import AveragePool
from fastreid_u.models.reid import ReIDModel
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes import get_method, methods

COUNT, PEOPLE, EPOCHS, STEPS, BATCH = 48, 6, 2, 4, 12
SMALL = dict(
    height=24, width=8, weights=None, bn_group=None, batch_size=BATCH, num_instances=4, epochs=EPOCHS, k1=8, k2=3,
    eps=0.6, seed=3, center_per_camera=False,
)  # fmt: skip
OWN = {
    "cap": dict(inter_start=1),
    "cap_cluster_contrast": dict(inter_start=1),
    "cap_cluster_contrast_proxy": dict(inter_start=1),
    "cluster_contrast_infomap": dict(min_size=2, min_similarity=0.2),
    "cluster_contrast_uda": dict(reliability=True, unclustered="row"),
    "csa_hps": dict(saa_steps=2, heads=4),
    "pplr": dict(aals_start=1, agreement_k=4),
    "pplr_camera": dict(aals_start=1, agreement_k=4),
}


class Backbone(nn.Module):
    """One convolution and a BatchNorm: enough to have maps, weights and statistics that move."""

    num_features = 16

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, self.num_features, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(self.num_features)

    def forward(self, images):
        return self.norm(self.conv(images)).relu()


def network(number):
    torch.manual_seed(number)
    model = ReIDModel(Backbone(), AveragePool(), arch="small")
    model.bnneck = bnneck(model.num_features)
    return model


def pictures(number):
    """(48, 3, 24, 8) images of 6 people who differ in the colours of their stripes."""
    generator = torch.Generator().manual_seed(number)
    stripes = torch.randn(PEOPLE, 3, 3, 1, generator=generator)
    people = torch.arange(COUNT) % PEOPLE
    noise = torch.randn(COUNT, 3, 24, 8, generator=generator)
    return F.interpolate(stripes, (24, 8))[people] + 0.4 * noise, people


@dataclass
class Training:
    """What the engine does, with images in memory and its own state beside the recipe's."""

    method: str
    start: int
    targets: torch.Tensor | None = None
    losses: list = field(default_factory=list)

    def __post_init__(self):
        self.pixels = {"target": pictures(0)[0], "source": pictures(1)[0]}
        cameras = torch.arange(COUNT) // 6 % 3
        source = Images(COUNT, cameras, pids=pictures(1)[1])
        recipe_class = get_method(self.method)
        config = recipe_class.Config.for_dataset("synthetic", **SMALL | OWN.get(self.method, {}))
        self.recipe = recipe_class(config, Images(COUNT, cameras, source=source))
        self.recipe.build(network(self.start))
        self.optimizer = torch.optim.Adam([p for p in self.recipe.parameters() if p.requires_grad], lr=1e-3)

    def extract(self, model, *, of="target"):
        with torch.inference_mode():
            return model.eval()(self.pixels[of])

    def step(self, number):
        """Step ``number`` of the run; the first of an epoch begins it."""
        epoch, step = divmod(number, STEPS)
        if step == 0:
            features = self.recipe.features(self.extract, epoch)
            labels = self.recipe.labels(features, epoch)
            assert labels.max() > 0
            self.targets = self.recipe.begin_epoch(features, labels, epoch)
        self.recipe.train()
        batch = self.batch(epoch, torch.Generator().manual_seed(number))
        outputs = self.recipe(batch)
        loss = self.recipe.loss(outputs, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        detached = outputs.detach() if isinstance(outputs, torch.Tensor) else [each.detach() for each in outputs]
        self.recipe.update(type(outputs)(*detached) if hasattr(outputs, "_fields") else detached, batch)
        self.losses.append(loss.item())

    def batch(self, epoch, generator):
        taking = torch.nonzero(self.targets >= 0).flatten()
        rows = taking[torch.randperm(len(taking), generator=generator)[:BATCH]]
        count, images = len(self.recipe.views()), self.recipe.images
        others = torch.randperm(COUNT, generator=generator)[:BATCH]

        def shown(pixels):
            return tuple(pixels + 0.1 * torch.randn(pixels.shape, generator=generator) for _ in range(count))

        labelled = Batch(
            shown(self.pixels["source"][others]), others, images.source.pids[others], images.source.camids[others]
        )
        return Batch(
            shown(self.pixels["target"][rows]), rows, self.targets[rows], images.camids[rows], labelled, epoch=epoch
        )

    def saved(self):
        """The recipe's state as a file holds it, and what the engine keeps by itself."""
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.recipe.state_dict().items()}
        moments = {key: dict(value) for key, value in self.optimizer.state_dict()["state"].items()}
        moments = {key: {n: t.clone() for n, t in value.items()} for key, value in moments.items()}
        return save(tensors), moments, self.targets.clone()

    def restore(self, saved):
        tensors, moments, self.targets = saved
        self.recipe.load_state_dict(load(tensors))
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})


@pytest.mark.parametrize("method", methods())
def test_goes_on_to_the_bit_after_any_step(method):
    if method == "cluster_contrast_infomap" and importlib.util.find_spec("infomap") is None:
        pytest.skip("infomap is not installed (extra [infomap])")
    whole, states = Training(method, start=0), []
    for number in range(EPOCHS * STEPS):
        whole.step(number)
        states.append(whole.saved())
    assert len(set(whole.losses)) == len(whole.losses)
    for done, state in enumerate(states[:-1], 1):
        again = Training(method, start=done)  # another network, so that nothing is right by chance
        again.restore(state)
        last = min(done + 5, len(states))
        for number in range(done, last):
            again.step(number)
        assert again.losses == whole.losses[done:last], f"after step {done}"
        ours, theirs = (load(found[0]) for found in (again.saved(), states[last - 1]))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) or tensor.isnan().all(), (done, name)


def test_draws_go_on_where_they_were():
    whole, again = Draws(), Draws()
    whole.restart((1, 2, 3))
    whole.permutation(7)
    again.load_state_dict(load(save(whole.state_dict())))
    assert all(torch.equal(whole.permutation(count), again.permutation(count)) for count in (5, 12, 1, 9))
