# SPDX-License-Identifier: Apache-2.0
"""What a method can ask of the engine beyond one network and one view: tried with a method that asks for all of it."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fastreid_u
from fastreid_u._toml import load_toml
from fastreid_u.config import option
from fastreid_u.data import load_dataset, test_transform
from fastreid_u.engine import optimizer
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.models.domains import domain, single_domain, split_domains
from fastreid_u.recipe import Paper
from fastreid_u.recipes import get_method
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

SMALL = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=3,
    epochs=2, workers=0, k1=8, k2=3, center_per_camera=True, calibrate_bn=2, eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GreedyConfig(ClusterContrastConfig):
    source: str | None = option(None, "a labelled set")


class Greedy(ClusterContrast):
    """Two views, a teacher that is clustered and ranked, two domains, a schedule, terms of the loss, a counter."""

    name, paper, Config = "greedy", Paper("Everything at once", published=False), GreedyConfig
    seen: ClassVar[list] = []

    def __init__(self, config, images):
        super().__init__(config, images)
        self.labels = DBSCANLabels(config, images, lambda epoch: config.eps - 0.1 * epoch)

    def build(self, model):
        split_domains(model)
        super().build(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def ranked(self):
        return {"model": single_domain(self.model), "teacher": single_domain(self.teacher)}

    def views(self):
        return (*super().views(), test_transform(self.config.height, self.config.width))

    def features(self, extract, epoch):
        self.source_rows = extract(self.teacher, of="source")
        return extract(self.teacher)

    def forward(self, batch):
        with domain(self.model, "source"):
            labelled = self.model(batch.source.images)
        return self.model(batch.images), labelled

    def loss(self, outputs, batch):
        type(self).seen.append((len(batch.views), tuple(batch.images.shape), batch.camids, batch.source, batch.epoch))
        own, labelled = outputs
        rows = F.normalize(self.source_rows, dim=1)
        return {
            "clusters": super().loss(own, batch),
            "source": F.cross_entropy(labelled @ rows.T, batch.source.indices),
        }

    def update(self, outputs, batch):
        assert not outputs[0].requires_grad
        super().update(outputs[0], batch)
        self.steps += 1
        for ours, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs, 0.1)


def run(world, source, folder, **changes):
    dataset = load_dataset("market1501", world)
    return fastreid_u.train(dataset, logs_dir=folder, method=Greedy, source=str(source), **{**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(tiny_world, tiny_source, tmp_path_factory):
    Greedy.seen.clear()
    return run(tiny_world, tiny_source, tmp_path_factory.mktemp("greedy") / "run")


def test_a_step_sees_all_views_cameras_and_labelled_images(finished):
    assert len(Greedy.seen) == 6
    assert [epoch for *_, epoch in Greedy.seen] == [0] * 3 + [1] * 3
    for views, shape, camids, source, _ in Greedy.seen:
        assert (views, shape) == (2, (16, 3, 64, 32))
        assert set(camids.tolist()) <= {0, 1, 2}
        assert len(source.views) == 2
        assert source.images.shape == (16, 3, 64, 32)
        assert set(source.targets.tolist()) <= set(range(6))  # identities, numbered from 0
        assert source.source is None


def test_the_better_network_is_saved_as_an_ordinary_one(finished):
    assert all(record["network"] in ("model", "teacher") for record in finished.records)
    saved = load_file(finished.folder / "model_best.safetensors")
    plain = fastreid_u.load_model(finished.folder, which="best")[0]
    assert saved.keys() == plain.state_dict().keys()


def test_teacher_second_domain_and_counter_survive_a_crash(finished, tiny_world, tiny_source, tmp_path, power_cut):
    with power_cut(1):
        run(tiny_world, tiny_source, tmp_path)
    resumed = run(tiny_world, tiny_source, tmp_path, resume=True)
    ours, theirs = (load_file(r.folder / "state.safetensors") for r in (resumed, finished))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("recipe.teacher.") for name in ours)
    assert any(".source." in name for name in ours)
    assert ours["recipe.steps"].item() == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_source_is_asked_for_by_name(tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    with pytest.raises(ValueError, match="source must name a labelled set for method 'greedy', got None"):
        fastreid_u.train(dataset, logs_dir=tmp_path, method=Greedy, **SMALL)
    with pytest.raises(ValueError, match="source_data must be left out for method 'cluster_contrast'"):
        fastreid_u.train(dataset, logs_dir=tmp_path, source_data={"seed": 1}, **SMALL)
    with pytest.raises(ValueError, match=r"source must hold other images than the set to learn, got .* for both"):
        run(tiny_world, tiny_world, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rendered_source_has_other_people_unless_its_dials_are_given(tiny_world, tmp_path, monkeypatch):
    """What the user gives of ``source_data`` comes over the seed of the source."""
    asked = []

    def load(name, root, **dials):
        asked.append((name, {key: value for key, value in dials.items() if key != "progress"}))
        raise FileNotFoundError("nothing is rendered here")

    dataset = load_dataset("market1501", tiny_world)
    monkeypatch.setattr("fastreid_u.data.load_dataset", load)
    for source_data in (None, {"cameras": 2}, {"seed": 7}):
        with pytest.raises(FileNotFoundError, match="nothing is rendered"):
            fastreid_u.train(
                dataset, logs_dir=tmp_path, method=Greedy, source="synthetic", source_data=source_data, **SMALL
            )
    assert asked == [("synthetic", dials) for dials in ({"seed": 50}, {"seed": 50, "cameras": 2}, {"seed": 7})]


def test_a_method_that_needs_cameras_says_so_before_any_work(plant, tmp_path):
    class Cameras(ClusterContrast):
        name = "cameras"

        def __init__(self, config, images):
            super().__init__(config, images)
            images.require_cameras(self.name)

    folder = plant("crops", "a.jpg", "b.jpg")
    with pytest.raises(ValueError, match="method 'cameras' needs images of two cameras or more"):
        fastreid_u.train(
            str(folder), logs_dir=tmp_path / "run", method=Cameras, **{**SMALL, "center_per_camera": False}
        )
    assert not (tmp_path / "run").exists()


def test_a_method_that_returns_no_targets_is_named(tiny_world, tmp_path):
    class Forgetful(ClusterContrast):
        name = "forgetful"

        def begin_epoch(self, features, labels, epoch):
            super().begin_epoch(features, labels, epoch)

    dataset = load_dataset("market1501", tiny_world)
    with pytest.raises(TypeError, match=r"begin_epoch of 'forgetful' must return \(N,\) targets, got None"):
        fastreid_u.train(dataset, logs_dir=tmp_path, method=Forgetful, **SMALL)


def test_warm_up_is_linear_then_drops():
    config = ClusterContrastConfig(lr=1.0, warmup_epochs=10, warmup_factor=0.01, step_size=20)
    rates = [optimizer.learning_rate(config, epoch) for epoch in (0, 5, 9, 10, 20, 40)]
    assert rates == pytest.approx([0.01, 0.505, 0.901, 1, 0.1, 0.01])  # part-a's table for CAP


def test_optimisers_and_their_reset(tiny_world, tiny_source, tmp_path):
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert optimizer.make_optimizer(weight, ClusterContrastConfig(optimizer="sgd")).defaults["momentum"] == 0.9
    assert isinstance(optimizer.make_optimizer(weight, ClusterContrastConfig(optimizer="adamw")), torch.optim.AdamW)
    kept = run(tiny_world, tiny_source, tmp_path / "kept", reset_optimizer=False)
    reset = run(tiny_world, tiny_source, tmp_path / "reset", reset_optimizer=True)
    steps = [load_file(r.folder / "state.safetensors")["optimizer.0.step"].item() for r in (kept, reset)]
    assert steps == [6, 3]


OWN = """
from dataclasses import dataclass
from fastreid_u.config import option
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

@dataclass(frozen=True, kw_only=True)
class ScaledConfig(ClusterContrastConfig):
    scale: float = option(0.5, "factor on the loss")

class Scaled(ClusterContrast):
    name, Config = "scaled", ScaledConfig

    def loss(self, outputs, batch):
        return self.config.scale * super().loss(outputs, batch)
"""


def test_a_method_in_a_file_of_ones_own(tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(OWN)
    scaled = get_method(f"{file}:Scaled")
    assert scaled.Config(scale=2.0).scale == 2.0
    assert get_method("fastreid_u.recipes.cluster_contrast:ClusterContrast") is ClusterContrast
    with pytest.raises(ValueError, match=r"must name a Recipe in .*my_method\.py, got 'Skaled'"):
        get_method(f"{file}:Skaled")
    with pytest.raises(FileNotFoundError, match="must name a file that exists"):
        get_method("nowhere.py:Scaled")


def test_the_method_that_the_docs_show_trains_from_the_command_line(tiny_world, tmp_path):
    from fastreid_u.cli import main

    docs = (Path(__file__).parents[2] / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", docs[docs.index("## Your own") :], re.DOTALL)
    (tmp_path / "two_views.py").write_text(code, encoding="utf-8")
    told = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if not isinstance(value, bool)]
    folder = tmp_path / "run"
    given = [str(tiny_world), "--method", f"{tmp_path / 'two_views.py'}:TwoViews", "--logs-dir", str(folder), "--quiet"]
    assert main(["train", *given, "--consistency", "1.0", *told]) == 0
    stored = load_toml((folder / "config.toml").read_text(encoding="utf-8"))
    assert stored["config"]["consistency"] == 1.0
    assert stored["run"]["method"] == "two_views"
