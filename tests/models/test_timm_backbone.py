# SPDX-License-Identifier: Apache-2.0
"""Networks of timm: pooled and fitted to the images as their kind needs, and refused by name."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.models import (
    build_model,
)


def images(batch=4, height=64, width=32, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


def test_timm_convolutional_network(timm):
    """Its map is pooled by us; BatchNorms fused with an activation can be kept but not grouped."""
    model = build_model("timm/test_efficientnet", weights=None, pooling="avg", seed=0).eval()
    with torch.no_grad():
        feature_map = model.feature_map(images())
        assert feature_map.shape[:2] == (4, model.num_features)
        torch.testing.assert_close(model(images()), F.normalize(model.neck(feature_map.mean((2, 3)))))
    assert model.describe()["pooling"] == "avg"
    with pytest.raises(ValueError, match=r"set_bn_group: model must hold no BatchNorm but .* got a BatchNormAct2d"):
        build_model("timm/test_efficientnet", weights=None, bn_group=2)


def test_timm_token_network(timm):
    """It pools as its own head does, and its positions are fitted to the images."""
    model = build_model("timm/test_vit", weights=None, image_size=(64, 32), seed=0).eval()
    with torch.no_grad():
        features = model(images())
        assert features.shape == (4, model.num_features)
        torch.testing.assert_close(features, F.normalize(model.neck(model.backbone.net(images()))))
    assert model.describe()["pooling"] == "the network's own"
    assert not any(name.startswith("pooling") for name in model.state_dict())


def test_timm_checkpoint_of_another_image_size_is_refused(timm, tmp_path):
    model = build_model("timm/test_vit", weights=None, image_size=(64, 32), seed=0)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    again = build_model("timm/test_vit", weights=tmp_path / "ours.pth", image_size=(64, 32))
    assert same(model, again)
    with pytest.raises(ValueError, match=r"pos_embed must have shape .* in ours.pth"):
        build_model("timm/test_vit", weights=tmp_path / "ours.pth", image_size=(128, 64))


def test_timm_pretrained_file_is_fitted_to_the_image_size(timm, tmp_path):
    net = timm.create_model("test_vit", pretrained=False, num_classes=10)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    model = build_model("timm/test_vit", weights=tmp_path / "vit.pth", image_size=(64, 32))
    assert model.backbone.net.pos_embed.shape[1] < net.pos_embed.shape[1]
    assert torch.equal(model.backbone.net.patch_embed.proj.weight, net.patch_embed.proj.weight)
    assert "ignored head.weight, head.bias" in model.describe()["weights"]


def test_timm_unknown_name_and_no_network(timm, monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be a model of timm .*near: .*test_vit.*, got 'test_vi'"):
        build_model("timm/test_vi", weights=None)

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"could not get timm's weights of test_vit \(no route to host\)"):
        build_model("timm/test_vit", weights="imagenet")


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match="needs timm: pip install timm"):
        build_model("timm/test_vit", weights=None)
