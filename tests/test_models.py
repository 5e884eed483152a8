# SPDX-License-Identifier: Apache-2.0
"""Networks: what they compute, what they are made of, and which weight files they take or refuse."""

import hashlib
import io
import pickle
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastreid_u.models import (
    POOLINGS,
    GroupBatchNorm1d,
    GroupBatchNorm2d,
    build_model,
    load_weights,
    model_names,
    read_weights,
    set_bn_group,
)
from fastreid_u.models import weights as weights_module
from fastreid_u.models.ibn import IBN
from fastreid_u.models.resnet import ALIASES, RESNETS, ResNet

DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"


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


# timm


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


# Weights of a file


@pytest.mark.parametrize("form", ["bare", "state_dict", "module.", "_orig_mod.module.", "safetensors"])
def test_round_trip_by_path(tmp_path, form):
    saved = tiny(bn_group=2)
    with torch.no_grad():
        saved.train()(images())  # running statistics move as well
        saved.pooling.p.fill_(4.5)
    state = saved.state_dict()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save({"state_dict": state, "epoch": 3, "best_mAP": 0.5, "note": "text"}, path)
    else:
        prefix = "" if form == "bare" else form
        torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    model = build_model("resnet10", weights=str(path), seed=9)
    assert same(model, saved)
    assert model.describe()["weights"] == f"{path.name} ({len(state)} tensors)"
    assert read_weights(path).keys() == state.keys()


def test_backbone_file_leaves_classifier_aside_and_keeps_the_head(tmp_path):
    source = tiny(seed=3)
    state = {**source.backbone.state_dict(), "fc.weight": torch.ones(10, 256), "fc.bias": torch.ones(10)}
    torch.save(state, tmp_path / "imagenet.pth")
    model = build_model("resnet10", weights=tmp_path / "imagenet.pth", pooling="avg", seed=0)
    assert same(model.backbone, source.backbone)
    assert "ignored fc.weight, fc.bias" in model.describe()["weights"]
    assert torch.equal(model.bnneck.weight, torch.ones(256))


def spcl_names(model, stem_relu=True):
    """A state dict as SpCL and Cluster Contrast name it."""
    first = 4 if stem_relu else 3
    names = {"backbone.conv1.": "base.0.", "backbone.bn1.": "base.1.", "pooling.": "gap.", "bnneck.": "feat_bn."}
    names |= {f"backbone.layer{i + 1}.": f"base.{first + i}." for i in range(4)}
    state = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old in names if name.startswith(old))
        state[names[old] + name.removeprefix(old)] = tensor
    return state


@pytest.mark.parametrize("stem_relu", [True, False])
def test_published_checkpoints(tmp_path, stem_relu):
    """With DataParallel's prefix and the best mAP as a NumPy scalar, which is dropped unread."""
    source = tiny(seed=4, stem_relu=stem_relu)
    nn.init.uniform_(source.bnneck.weight)
    state = {"module." + name: tensor for name, tensor in spcl_names(source, stem_relu).items()}
    torch.save({"state_dict": state, "epoch": 49, "best_mAP": np.float64(0.83)}, tmp_path / "best.pth.tar")
    model = build_model("resnet10", weights=tmp_path / "best.pth.tar", stem_relu=stem_relu)
    assert same(model, source)
    message = rf"stem_relu must be {stem_relu} for best.pth.tar, got {not stem_relu}"
    with pytest.raises(ValueError, match=message):
        build_model("resnet10", weights=tmp_path / "best.pth.tar", stem_relu=not stem_relu)


@pytest.mark.parametrize(("saved", "built"), [("gem", "avg"), ("avg", "gem")])
def test_checkpoint_of_another_pooling_is_refused(saved, built):
    model = tiny(pooling=built)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state in (tiny(pooling=saved, seed=1).state_dict(), spcl_names(tiny(pooling=saved, seed=1))):
        with pytest.raises(ValueError, match=r"pooling of the model must (not )?be 'gem' for a state dict"):
            load_weights(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_backbone_tensor_is_refused_and_nothing_changes(whole):
    source = tiny(seed=1)
    state = dict(source.state_dict() if whole else source.backbone.state_dict())
    lost = "backbone.layer2.0.bn1.running_var" if whole else "layer2.0.bn1.running_var"
    del state[lost]
    model, untouched = tiny(), tiny()
    with pytest.raises(
        ValueError, match=rf"every tensor of the backbone \(resnet10\), got x, which lacks 1 of \d+: {lost}"
    ):
        load_weights(model, state, source="x")
    assert same(model, untouched)


def test_another_shape_is_refused_and_nothing_changes():
    model, untouched = tiny(), tiny()
    state = {**tiny(seed=1).state_dict(), "bnneck.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"bnneck.weight must have shape \(256,\) for resnet10, got \(3,\) in a state"):
        load_weights(model, state)
    assert same(model, untouched)


def test_counters_of_batches_may_be_missing():
    """Old files do not have them."""
    state = {name: t for name, t in tiny(seed=1).state_dict().items() if not name.endswith("num_batches_tracked")}
    report = load_weights(tiny(), state)
    assert (report.loaded, report.ignored) == (len(state), ())


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("legacy", [True, False])
def test_hostile_pickle_is_refused_unexecuted(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": tiny().state_dict(), "extra": _Bomb()}
    torch.save(content, "bomb.pth", _use_new_zipfile_serialization=not legacy)
    Path("bare.pkl").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    for name in ("bomb.pth", "bare.pkl"):
        with pytest.raises(
            RuntimeError, match=r"must hold tensors, numbers and text only, .* would have to be executed"
        ):
            build_model("resnet10", weights=name)
    assert not Path("exploded").exists()


def test_numpy_reconstruction_is_dropped_not_run(tmp_path):
    """The names that stand for a NumPy scalar lead to a class that ignores what it is given."""
    value = np.float64(0.5)
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": value, "dtype": np.dtype("float32")}, tmp_path / "a.pth")
    assert set(read_weights(tmp_path / "a.pth")) == {"a"}


def test_file_that_is_missing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_weights: path must be a file, got .*gone.pth"):
        build_model("resnet10", weights=tmp_path / "gone.pth")
    for content in (b"", b"hello", b"\x80\x02.", b"PK\x03\x04xx", b"<html>not found</html>"):
        for name in ("a.pth", "a.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RuntimeError, match="read_weights: path must"):
                read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match="must hold a dict of tensors, got a list"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [True, False])
def test_damaged_file_raises_runtime_error_or_nothing(tmp_path, legacy):
    """Cut anywhere, or with bytes changed."""
    path, rng = tmp_path / "a.pth", np.random.default_rng(0)
    state = {"state_dict": {"module.a": torch.arange(4.0), "b": torch.zeros(2, 2)}, "epoch": 3}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), []
    for trial in range(200):
        data = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for _ in range(3):
            data[rng.integers(min(len(data), 600))] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            read_weights(path)
        except RuntimeError as error:
            refused.append(str(error))
    assert len(refused) > 60
    assert all(text.startswith("read_weights: path must") for text in refused)


# ImageNet weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def serve(monkeypatch, content):
    """Answer every download with ``content``; returns the list of addresses asked for."""
    asked = []

    class Response(io.BytesIO):
        def info(self):
            return self

        def get_all(self, name):
            return [str(len(content))]

        headers = property(info)

    def urlopen(request, *arguments, **options):
        asked.append(getattr(request, "full_url", request))
        if content is None:
            raise urllib.error.URLError("Name or service not known")
        return Response(content)

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize(
    ("arch", "file"), [("resnet50", "resnet50-0676ba61.pth"), ("ibn50a", "resnet50_ibn_a-d9d0bb7b.pth")]
)
def test_offline_is_an_error_that_names_the_file_and_its_place(monkeypatch, hub, arch, file):
    asked = serve(monkeypatch, None)
    with pytest.raises(
        RuntimeError, match=r"could not download the ImageNet weights .* Without a network, put"
    ) as caught:
        build_model(arch)
    assert f"put {file} into {hub}, or give weights=" in str(caught.value)
    assert asked[0].endswith("/" + file)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    ("arch", "file"),
    [("resnet_ibn50a", "resnet50_ibn_a-d9d0bb7b.pth"), ("resnet_ibn101a", "resnet101_ibn_a-59ea0ac6.pth")],
)
def test_ibn_weights_come_from_the_published_release(arch, file):
    assert RESNETS[arch].imagenet == f"https://github.com/XingangPan/IBN-Net/releases/download/v1.0/{file}"


def test_download_is_hash_checked_and_then_kept(monkeypatch, hub):
    """A stand-in file for a small network, under a name that ends in its hash as the real ones do."""
    source, buffer = tiny(seed=7), io.BytesIO()
    torch.save({**source.backbone.state_dict(), "fc.weight": torch.ones(2, 256)}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    url = f"https://example.org/v1/stand_in-{digest}.pth"
    monkeypatch.setitem(weights_module.RESNETS, "resnet10", RESNETS["resnet10"]._replace(imagenet=url))
    asked = serve(monkeypatch, buffer.getvalue() + b"tampered")
    with pytest.raises(RuntimeError, match=r'could not download .* \(invalid hash value \(expected "' + digest):
        build_model("resnet10")
    assert list(hub.iterdir()) == []
    asked = serve(monkeypatch, buffer.getvalue())
    for _ in range(2):
        model = build_model("resnet10")
        assert same(model.backbone, source.backbone)
    assert asked == [url]  # the second time it lay there
    assert model.describe()["weights"].startswith(f"stand_in-{digest}.pth (")
    assert "ignored fc.weight" in model.describe()["weights"]
