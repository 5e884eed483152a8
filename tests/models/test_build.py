# SPDX-License-Identifier: Apache-2.0
"""Networks: what they compute, what they are made of, and which weight files they take or refuse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u.models import (
    POOLINGS,
    GroupBatchNorm1d,
    GroupBatchNorm2d,
    build_model,
    model_names,
    set_bn_group,
)
from fastreid_u.models.ibn import IBN
from fastreid_u.models.resnet import ALIASES, RESNETS, ResNet

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def tiny(**options):
    """The smallest network, random but the same each time."""
    return build_model("resnet10", **{"weights": None, "seed": 0} | options)


def images(batch=4, height=64, width=32, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def resnet50():
    """Built once; no test may change it."""
    return build_model("resnet50", weights=None, seed=0)


@pytest.fixture(scope="module")
def ibn50a():
    return build_model("ibn50a", weights=None, seed=0)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What is computed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_are_the_steps_one_after_the_other_and_of_unit_length(pooling, training):
    model = tiny(pooling=pooling).train(training)
    with torch.no_grad():
        features = model(images())
        feature_map = model.feature_map(images())
        pooled = model.pool(feature_map)
        necked = model.neck(pooled)
    assert feature_map.shape == (4, 256, 4, 2)
    assert features.shape == pooled.shape == necked.shape == (4, model.num_features)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features, F.normalize(necked))
    expected = F.batch_norm(
        pooled, None if training else torch.zeros(256), None if training else torch.ones(256), training=training
    )
    torch.testing.assert_close(necked, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("last_stride", "shape"), [(1, (16, 8)), (2, (8, 4))])
def test_last_stride(last_stride, shape):
    model = tiny(last_stride=last_stride).eval()
    with torch.no_grad():
        assert model.feature_map(images(1, 256, 128)).shape[-2:] == shape
        assert model.feature_map(images(1, 100, 52)).shape[-2:] == ((7, 4) if last_stride == 1 else (4, 2))
    assert model.describe()["last_stride"] == last_stride


def test_resnet50_is_torchvisions_but_for_its_last_stride(resnet50):
    """The same parameters under the same names; the same map too once the stride is 2 again."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = torchvision.models.resnet50(weights=None)
    own = resnet50.backbone.state_dict()
    expected = {name: p.shape for name, p in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: p.shape for name, p in own.items()} == expected
    assert resnet50.backbone.layer4[0].conv2.stride == (1, 1)
    assert resnet50.backbone.layer4[0].downsample[0].stride == (1, 1)
    assert all(m.dilation == (1, 1) for m in resnet50.modules() if isinstance(m, nn.Conv2d))
    theirs.load_state_dict(own, strict=False)
    strided = ResNet(RESNETS["resnet50"], last_stride=2)
    strided.load_state_dict(own)
    x, maps = images(1), []
    theirs.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        theirs.eval()(x)
        torch.testing.assert_close(strided.eval()(x), maps[0], rtol=1e-4, atol=1e-4)


def test_ibn_is_instance_norm_on_the_first_half():
    layer, x = IBN(7).double(), images(3, 5, 4).double().repeat(1, 3, 1, 1)[:, :7]
    nn.init.uniform_(layer.IN.weight, 0.5, 2)
    nn.init.normal_(layer.BN.bias)
    out = layer(x)
    first = F.instance_norm(x[:, :3]) * layer.IN.weight[:, None, None]
    second = F.batch_norm(x[:, 3:], None, None, bias=layer.BN.bias, training=True)
    torch.testing.assert_close(out, torch.cat([first, second], 1))
    assert set(layer.state_dict()) >= {"IN.weight", "IN.bias", "BN.weight", "BN.running_mean"}


def test_ibn_a_stands_in_stages_one_to_three(ibn50a):
    places = {name for name, module in ibn50a.backbone.named_modules() if isinstance(module, IBN)}
    assert places == {f"layer{stage}.{i}.bn1" for stage, depth in ((1, 3), (2, 4), (3, 6)) for i in range(depth)}
    assert isinstance(ibn50a.backbone.layer4[0].bn1, nn.BatchNorm2d)
    assert ibn50a.backbone.layer1[0].bn1.half == 32


def test_stem_relu_can_be_left_out():
    with_relu, without = tiny(), tiny(stem_relu=False)
    assert same(with_relu, without)
    x = images()
    with torch.no_grad():
        stem = without.backbone.bn1(without.backbone.conv1(x))
        assert torch.equal(without.backbone.relu(stem.clone()), stem)
        assert torch.equal(with_relu.backbone.relu(stem.clone()), stem.clamp(min=0))
    assert without.describe()["stem_relu"] is False


def test_neck_bias_is_frozen_at_zero_and_its_weight_is_trained():
    model = tiny()
    assert not model.bnneck.bias.requires_grad
    assert not model.bnneck.bias.any()
    assert model.bnneck.weight.requires_grad
    assert (model.bnneck.eps, model.bnneck.momentum) == (1e-5, 0.1)
    (model(images()) @ torch.randn(256)).sum().backward()
    assert model.bnneck.bias.grad is None
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.named_parameters()} - {"bnneck.bias"}


def test_gem_has_one_exponent():
    assert tiny().pooling.p.tolist() == [3.0]
    assert "pooling.p" in tiny().state_dict()
    assert "pooling.p" not in tiny(pooling="avg").state_dict()


def test_autocast_gives_float32_rows_of_unit_length():
    model = tiny().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        assert (F.cosine_similarity(half, model(images())) > 0.99).all()


def test_compiles_and_exports():
    """One graph for any batch size, no break."""
    model = tiny(bn_group=2).eval()
    with torch.no_grad():
        expected = model(images())
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(images()), expected)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images(7))[:4], model(images(7))[:4])


# What is built


def docs_table():
    """Columns of the first table of docs/models.md: names, parameters, D and map."""
    row = re.compile(r"^\| (`[^|]+) \| ([\d ]+) \| (\d+) \| (\d+)×(\d+) \| (.+) \|$", re.MULTILINE)
    for names, parameters, width, *shape, weights in row.findall(DOCS.read_text(encoding="utf-8")):
        arch, *aliases = re.findall(r"`([^`]+)`", names)
        yield arch, aliases, int(parameters.replace(" ", "")), int(width), tuple(map(int, shape)), weights


@pytest.mark.parametrize(("arch", "aliases", "parameters", "width", "shape", "weights"), list(docs_table()))
def test_docs_table(arch, aliases, parameters, width, shape, weights):
    """Counted on the meta device, so nothing is computed or allocated."""
    spec = RESNETS[arch]
    with torch.device("meta"):
        backbone = ResNet(spec)
        assert backbone(torch.empty(1, 3, 256, 128)).shape == (1, width, *shape)
    assert sum(p.numel() for p in backbone.parameters()) + 2 * width + 1 == parameters  # the neck, and GeM's exponent
    assert backbone.num_features == width
    assert all(ALIASES[alias] == arch for alias in aliases)
    source = {None: "none", "torchvision": "torchvision, V1"}.get(spec.imagenet, "IBN-Net release v1.0")
    assert weights == source


def test_docs_table_and_names_are_complete():
    assert [row[0] for row in docs_table()] == model_names() == list(RESNETS)
    assert set(ALIASES) == {"ibn50a", "ibn101a", "resnet50_ibn_a", "resnet101_ibn_a"}


def test_card(ibn50a):
    assert ibn50a.arch == "resnet_ibn50a"
    card = tiny(bn_group=8, bn_running="mean").describe()
    assert card == {
        "arch": "resnet10",
        "parameters": 1_230_753,
        "num_features": 256,
        "pooling": "gem",
        "last_stride": 1,
        "stem_relu": True,
        "weights": "random",
        "bn_group": 8,
        "bn_running": "mean",
    }


def test_bn_group_reaches_backbone_and_neck():
    model = tiny(bn_group=2)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(m) for m in norms} == {GroupBatchNorm1d, GroupBatchNorm2d}
    assert {m.group_size for m in norms} == {2}
    assert not model.bnneck.bias.requires_grad
    with torch.no_grad():
        together = model(images())
        halves = torch.cat([model(images()[:2]), model(images()[2:])])
    torch.testing.assert_close(together, halves, rtol=1e-4, atol=1e-5)
    set_bn_group(model, None)
    with torch.no_grad():
        assert not torch.allclose(model(images()), halves, atol=1e-3)


def test_seed_repeats_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = tiny(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(model, tiny(seed=1))
    assert not same(model, tiny(seed=2))
    unseeded = tiny(seed=None)
    assert not torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert same(unseeded, tiny(seed=None))


def test_random_convolutions_are_kaiming_normal_by_fan_out(resnet50):
    for conv in (resnet50.backbone.conv1, resnet50.backbone.layer3[2].conv2):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert abs(conv.weight.std() * (fan_out / 2) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet51"}, r"arch must be one of resnet18, .*ibn50a.* or timm/<name>, got 'resnet51'"),
        ({"pooling": "mean"}, "pooling must be one of 'gem', 'avg', 'max', got 'mean'"),
        ({"last_stride": 3}, "last_stride must be 1 or 2, got 3"),
        ({"bn_group": 0}, "group must be at least 1, got 0"),
        ({"bn_running": "last"}, "running must be one of 'first', 'mean', got 'last'"),
        ({"weights": "imagenet"}, r"weights must be None or a file for resnet10, which has none, got 'imagenet'"),
        ({"arch": "timm/resnet10t", "stem_relu": False}, r"stem_relu must be True for timm/resnet10t, got False"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(**{"arch": "resnet10", "weights": None} | options)


def test_importing_the_package_loads_neither_torchvision_nor_timm():
    code = "import sys, fastreid_u.models; print([m for m in ('torchvision', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
