# SPDX-License-Identifier: Apache-2.0
"""What a run's settings are where the network is not the method's own: stem, stochastic depth, pixels."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fastreid_u.config import Config
from fastreid_u.data import Loaded
from fastreid_u.data.transforms import Normalize, normalize_by, test_transform
from fastreid_u.engine.fit import _loaded
from fastreid_u.engine.network_settings import fitted_to_network, pixel_warning
from fastreid_u.images import Images
from fastreid_u.models import build_model
from fastreid_u.models.build import pretrained_norm
from fastreid_u.pixel_norm import mean_and_std, named
from fastreid_u.recipes import get_method
from fastreid_u.trained.model import load_model

timm = pytest.importorskip("timm", reason="timm is not installed")

CLIP = "timm/vit_base_patch16_clip_224.openai"


def fitted(method="cluster_contrast", **given):
    return fitted_to_network(get_method(method).Config.for_dataset("market1501", **given), given)


@pytest.mark.parametrize(
    ("given", "pixel_norm"),
    [
        ({}, "imagenet"),
        ({"arch": "ibn50a"}, "imagenet"),
        ({"arch": "timm/vit_tiny_patch16_224"}, "half"),
        ({"arch": "timm/tf_efficientnet_lite0"}, "half"),
        ({"arch": "timm/efficientnet_b0"}, "imagenet"),
        ({"arch": "timm/vit_small_patch16_224.dino"}, "imagenet"),  # the tag decides, not the network
        ({"arch": CLIP}, "clip"),
        ({"arch": "timm/vit_tiny_patch16_224", "pixel_norm": "imagenet"}, "imagenet"),  # as asked for
        ({"arch": "timm/vit_tiny_patch16_224", "weights": None}, "imagenet"),  # random weights want none
        ({"method": "vit_cluster_contrast", "weights": "person.pth"}, "half"),  # the method's own
        ({"method": "vit_cluster_contrast", "weights": "imagenet", "arch": CLIP}, "clip"),
    ],
)
def test_pixels_are_normalised_as_the_downloaded_weights_want_them(given, pixel_norm):
    assert fitted(**given).pixel_norm == pixel_norm


def test_a_deviation_without_a_name_is_six_numbers(monkeypatch):
    about = timm.get_pretrained_cfg("test_vit")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: about)
    about.mean, about.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert pretrained_norm("timm/test_vit") == "0.1,0.2,0.3,0.4,0.5,0.6"
    (step,) = test_transform(8, 4, pixel_norm="0.1,0.2,0.3,0.4,0.5,0.6").steps
    assert step == Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("norm", ["imagenet", "half", "clip", "0.1,0.2,0.3,0.4,0.5,0.6"])
def test_names_and_numbers_of_pixel_norm_are_each_others_inverse(norm):
    assert named(*mean_and_std(norm)) == norm
    assert named(*mean_and_std(",".join(map(str, sum(mean_and_std(norm), ()))))) == norm
    assert normalize_by("imagenet") == Normalize()
    assert Config(pixel_norm=norm).pixel_norm == norm


@pytest.mark.parametrize("norm", ["whole", "", "0.5,0.5,0.5", "0,0,0,0,1,1", "128,128,128,1,1,1", "0,0,0,1,1,nan"])
def test_a_pixel_norm_that_is_none_is_refused_with_the_settings(norm):
    with pytest.raises(ValueError, match="config: pixel_norm must be one of imagenet, half, clip or six numbers"):
        Config(pixel_norm=norm)


def test_a_file_for_a_network_that_wants_other_pixels_is_warned_of():
    arch = "timm/tf_efficientnet_lite0"
    words = f"pixel_norm is imagenet, but timm's own weights of {arch} want half (--pixel-norm half)"
    assert words in pixel_warning(Config(arch=arch, weights="lite0.safetensors"))
    for quiet in ({"pixel_norm": "half"}, {"weights": None}, {"arch": "resnet50"}):
        assert pixel_warning(Config(**({"arch": arch, "weights": "lite0.safetensors"} | quiet))) is None


def test_the_default_stem_and_depth_of_a_method_hold_for_its_own_networks_only():
    """CAP's ResNets have no ReLU in the stem; transformers are trained with stochastic depth."""
    assert fitted("cap").stem_relu is False
    assert fitted("cap", arch="timm/test_efficientnet", weights=None).stem_relu is True
    refused = fitted("cap", arch="timm/test_efficientnet", weights=None, stem_relu=False)
    with pytest.raises(ValueError, match=r"stem_relu must be True for timm/test_eff.*, got False \(--stem-relu in the"):
        build_model(refused.arch, weights=None, stem_relu=refused.stem_relu)
    assert fitted("vit_cluster_contrast", arch="resnet50").drop_path == 0
    assert fitted("vit_cluster_contrast", arch="resnet50", drop_path=0.1).drop_path == 0.1  # which build_model refuses


def test_cap_trains_a_network_of_timm_with_its_own_pixels(smoke, tmp_path, capsys):
    """From a file: the run warns, keeps what it was given, and so does whoever loads it."""
    state = timm.create_model("test_efficientnet").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "own.safetensors")
    given = dict(arch="timm/test_efficientnet", weights=str(tmp_path / "own.safetensors"), num_instances=2, bn_group=8)
    run = smoke("cap", epochs=1, iters=1, pixel_norm="clip", quiet=False, **given)
    assert run.config.stem_relu is True
    assert "pixel_norm is clip, but timm's own weights of timm/test_efficientnet want" in capsys.readouterr().out
    assert load_model(run.folder)[1]["config"]["pixel_norm"] == "clip"


def test_a_batch_of_one_image_is_refused_with_the_settings():
    """BatchNorm needs two."""
    with pytest.raises(ValueError, match="config: batch_size must be at least 2, got 1"):
        Config(batch_size=1, num_instances=1)


def test_a_step_with_one_readable_image_is_left_out():
    """The others of its batch are damaged, which the run reports; BatchNorm would stop it."""
    view = torch.zeros(2, 3, 4, 4)
    reads = [Loaded(view[:count], torch.arange(count), []) for count in (2, 1, 0, 2)]
    recipe = SimpleNamespace(config=Config(), images=Images(2))
    target = SimpleNamespace(train_batches=lambda batches, seed: iter(reads))
    machine = SimpleNamespace(device=torch.device("cpu"))
    session = SimpleNamespace(recipe=recipe, machine=machine, source=None, target=target)
    assert [len(batch.images) for batch in _loaded(session, [], torch.zeros(2), 0)] == [2, 2]
