# SPDX-License-Identifier: Apache-2.0
"""Networks of timm: pooled and fitted to the images as their kind needs, and refused by name."""

import copy
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u.models import build_model, set_bn_group, single_domain, split_domains, timm_backbone


def images(batch=4, height=64, width=32, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


def test_timm_convolutional_network(timm):
    """Its map is pooled by us."""
    model = build_model("timm/test_efficientnet", weights=None, pooling="avg", seed=0).eval()
    with torch.no_grad():
        feature_map = model.feature_map(images())
        assert feature_map.shape[:2] == (4, model.num_features)
        torch.testing.assert_close(model(images()), F.normalize(model.neck(feature_map.mean((2, 3)))))
    assert model.describe()["pooling"] == "avg"


@pytest.mark.parametrize("running", ["first", "mean"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batchnorm_fused_with_an_activation_is_grouped(timm, running, channels_last):
    """EfficientNet's and its kin's: equal to one such BatchNorm for each group, gradients and statistics included."""
    from timm.layers import BatchNormAct2d

    plain = nn.Sequential(BatchNormAct2d(6, act_layer=nn.SiLU, drop_layer=nn.Identity))
    nn.init.uniform_(plain[0].weight, 0.5, 2)
    groups = [copy.deepcopy(plain) for _ in range(2)]
    x = torch.randn(7, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    weight = plain[0].weight
    set_bn_group(plain, 3, running)
    y = x.detach().clone().requires_grad_()
    expected = torch.cat([norm(chunk) for norm, chunk in zip(groups, y.split([3, 4]), strict=True)])
    found = plain(x)
    torch.testing.assert_close(found, expected)  # SiLU's last bit depends on where a chunk begins
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, groups[0][0].weight.grad + groups[1][0].weight.grad)
    means = [norm[0].running_mean for norm in groups]
    assert torch.equal(plain[0].running_mean, means[0] if running == "first" else torch.stack(means).mean(0))
    assert plain[0].weight is weight
    assert torch.equal(
        plain.eval()(x), F.silu(F.batch_norm(x, plain[0].running_mean, plain[0].running_var, weight, plain[0].bias))
    )
    set_bn_group(plain, None)
    assert type(plain[0]) is BatchNormAct2d
    assert isinstance(plain[0].act, nn.SiLU)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "regnety_002"])
def test_default_groups_of_a_method_fit_networks_of_timm(timm, name):
    model = build_model(f"timm/{name}", weights=None, bn_group=2, image_size=(64, 32), seed=0)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert "GroupBatchNormAct2d" in kinds
    assert all(kind.startswith("Group") for kind in kinds)
    plain = build_model(f"timm/{name}", weights=None, image_size=(64, 32), seed=0)
    assert same(model, plain)
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), plain.eval()(images()))
        assert not torch.equal(model.train()(images()), plain.train()(images()))
    split_domains(model)
    assert same(single_domain(model), model_of_domain := single_domain(model))
    assert torch.isfinite(model_of_domain(images())).all()


def test_a_batchnorm_that_cannot_be_grouped_names_the_way_out():
    model = nn.Sequential(nn.SyncBatchNorm(4))
    with pytest.raises(ValueError, match=r"got a SyncBatchNorm; use bn_group=None \(--bn-group None\)"):
        set_bn_group(model, 2)


@pytest.mark.parametrize(
    "name",
    ["mixer_b16_224", "levit_128s", "nest_tiny", "gmlp_s16_224", "coat_lite_tiny", "cait_xxs24_224", "inception_v3"],
)
def test_a_network_that_does_not_take_the_size_is_refused_when_it_is_built(timm, name):
    with pytest.raises(
        ValueError, match=rf"build_model: image_size must be one that timm/{name} takes, as 2.*, got 64 x 32"
    ):
        build_model(f"timm/{name}", weights=None, image_size=(64, 32))


@pytest.mark.parametrize("name", ["levit_128s", "crossvit_tiny_240", "efficientvit_b0"])
def test_networks_that_pool_by_themselves_are_built_at_their_size(timm, name):
    """A fixed grid; maps of two scales in a list; a head that cannot be taken off."""
    model = build_model(f"timm/{name}", weights=None, image_size=(224, 224)).eval()
    with torch.no_grad():
        assert model(images(1, 224, 224)).shape == (1, model.num_features)
    assert model.card["pooling"] == "the network's own"


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

    monkeypatch.setattr(timm_backbone, "_refuse_offline", lambda name: None)

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"could not get timm's weights of test_vit \(no route to host\)"):
        build_model("timm/test_vit", weights="imagenet")


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match="needs timm: pip install timm"):
        build_model("timm/test_vit", weights=None)


@pytest.mark.parametrize(("arch", "meant"), [("efficientnet_b0", "timm/efficientnet_b0"), ("resnet_50", "resnet50")])
def test_a_name_of_timm_without_its_prefix_names_the_network_that_is_meant(timm, arch, meant):
    with pytest.raises(ValueError, match=rf"got '{arch}'; did you mean {meant}\?$"):
        build_model(arch, weights=None)


def test_weights_without_a_network_are_refused_at_once(timm, monkeypatch):
    """Not after a minute of tries: the name of the server is looked up first."""

    def unknown(*arguments):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(timm_backbone, "getproxies", dict)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: pytest.fail("the download was tried"))
    with pytest.raises(
        RuntimeError, match=r"weights of test_vit \(.*not known\). Without a network, give weights=<path"
    ):
        build_model("timm/test_vit")
    with pytest.raises(
        ValueError, match="weights must be 'imagenet', None or a file for timm/test_vit, got 'imagenet_v2'"
    ):
        build_model("timm/test_vit", weights="imagenet_v2")
