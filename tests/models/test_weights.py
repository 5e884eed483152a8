# SPDX-License-Identifier: Apache-2.0
"""Weights: files of ours, of torchvision, of published code, damaged and hostile ones, and ImageNet's."""

import email.message
import hashlib
import io
import pickle
import urllib.error
import urllib.request
import urllib.response
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastreid_u.models import (
    build_model,
    load_weights,
    read_weights,
)
from fastreid_u.models import weights as weights_module
from fastreid_u.models.resnet import RESNETS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def tiny(**options):
    """The smallest network, random but the same each time."""
    return build_model("resnet10", **{"weights": None, "seed": 0} | options)


def images(batch=4, height=64, width=32, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def serve(monkeypatch, content):
    """Answer every download of this process with ``content``; returns the list of addresses asked for."""
    asked = []

    class Served(urllib.request.BaseHandler):
        handler_order = 0  # before the one that would go out

        def https_open(self, request):
            asked.append(request.full_url)
            if content is None:
                raise urllib.error.URLError("Name or service not known")
            headers = email.message.Message()
            headers["Content-Length"] = str(len(content))
            response = urllib.response.addinfourl(io.BytesIO(content), headers, request.full_url, 200)
            response.msg = "OK"
            return response

    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener(Served))
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


def test_the_second_version_is_asked_for_by_name(hub, monkeypatch):
    """The digits are those in torchvision's file names; BMW's log names the second file."""
    asked = serve(monkeypatch, None)
    for weights in ("imagenet", "imagenet_v2"):
        with pytest.raises(RuntimeError, match="could not download"):
            build_model("resnet50", weights=weights)
    assert [url.rpartition("/")[2] for url in asked] == ["resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"]
    for arch in ("resnet18", "resnet_ibn50a"):
        with pytest.raises(ValueError, match=f"weights must be 'imagenet' for {arch}, which has no V2"):
            build_model(arch, weights="imagenet_v2")


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
