# SPDX-License-Identifier: Apache-2.0
"""The tensors of other code bases' checkpoints, under our names.

A checkpoint's backbone lies under one prefix ("" in ImageNet files, "backbone." in ours and in fast-reid, "base." in
reid-strong-baseline and TransReID, "model." in Person_reID_baseline_pytorch, "base.<number>." in SpCL and what descends
from it), which is found by looking where the network's own names are. Pooling and neck have a few names each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastreid_u.models.reid import ReIDModel
from fastreid_u.models.timm_backbone import TimmBackbone

# Pooling and neck beside the backbone: SpCL and ours, reid-strong-baseline, fast-reid (new and old), AGW.
_HEADS = {
    "pooling.": "pooling.", "gap.": "pooling.", "heads.pool_layer.": "pooling.", "global_pool.": "pooling.",
    "bnneck.": "bnneck.", "feat_bn.": "bnneck.", "bottleneck.": "bnneck.", "heads.bottleneck.0.": "bnneck.",
    "heads.bnneck.": "bnneck.",
}  # fmt: skip
_BLOCK_NORM = re.compile(r"_blocks\.(\d+)\._bn(\d)\.")


@dataclass(frozen=True)
class Checkpoint:
    """A state dict under the names of a ``ReIDModel``.

    Attributes:
        tensors: by our name; what has no place with us keeps its own, or stands under the backbone's.
        whole: of a Re-ID network with pooling and neck, rather than of a bare backbone.
        ours: the backbone's names are those that this library writes.
        stem_relu: whether that network had a ReLU in its stem; None where the names do not tell.
        strong_baseline: named as in reid-strong-baseline, whose ResNets without IBN have no such ReLU.
    """

    tensors: dict[str, Tensor]
    whole: bool
    ours: bool
    stem_relu: bool | None
    strong_baseline: bool


def backbone_prefix(model: ReIDModel) -> str:
    """What stands before a backbone file's names in the state dict of ``model``."""
    return "backbone.net." if isinstance(model.backbone, TimmBackbone) else "backbone."


def under_our_names(state: Mapping[str, Tensor], model: ReIDModel, source: str) -> Checkpoint:
    """``state`` (of ``named_tensors``) with the names that ``model`` has for the same tensors.

    Raises:
        ValueError: a kind of checkpoint that cannot be read in full; ``source`` names it in the message.
    """
    inner = backbone_prefix(model)
    wanted = [name.removeprefix(inner) for name in model.state_dict() if name.startswith(inner)]
    state = {name.replace(".BN_T.", "."): tensor for name, tensor in state.items()}  # SpCL's target domain
    state, stem_relu = _spcl_names(state)
    if "_conv_stem.weight" in state:
        state = _efficientnet_names(state, wanted, model.arch, source)
    prefix = _prefix(state, wanted, source)
    outer = prefix.removesuffix(inner) if prefix.endswith(inner) else prefix[: prefix[:-1].rfind(".") + 1]
    tensors, whole = {}, prefix.removeprefix(outer) in ("backbone.", "backbone.net.", "base.")
    for name, tensor in state.items():
        new = inner + name.removeprefix(prefix) if name.startswith(prefix) else name.removeprefix(outer)
        if new not in model.state_dict():
            old = next((old for old in _HEADS if name.startswith(outer + old)), None)
            if old is not None:
                new = _HEADS[old] + name.removeprefix(outer + old)
            elif name.startswith("classifier.add_block.0.") and state["classifier.add_block.0.weight"].ndim == 1:
                new = "bnneck." + name.removeprefix("classifier.add_block.0.")  # Person_reID_baseline_pytorch
        if new == "pooling.p":
            tensor = tensor.reshape(1) if tensor.numel() == 1 else tensor  # a number in some code
        whole = whole or new.startswith(("pooling.", "bnneck."))
        tensors[new] = tensor
    _refuse_jigsaw(tensors, source)
    strong = prefix == f"{outer}base." and f"{inner}layer1.0.bn1.IN.weight" not in tensors
    return Checkpoint(tensors, whole, prefix == outer + inner, stem_relu, strong)


def _prefix(state: Mapping[str, Tensor], wanted: Sequence[str], source: str) -> str:
    """What stands before the backbone's names: the prefix under which most of ``wanted`` are in ``state``."""
    anchors = [name for name in wanted if not name.endswith("num_batches_tracked")]
    ends = {"." + anchors[0], "." + anchors[-1]}
    prefixes = {name.removesuffix(end[1:]) for end in ends for name in state if name.endswith(end)} | {""}
    found = {prefix: sum(prefix + name in state for name in anchors) for prefix in prefixes}
    most = max(found.values())
    if 2 * most < len(anchors):  # of another network: the message names what is missing where one would look for it
        return next((usual for usual in ("backbone.", "base.") if any(n.startswith(usual) for n in state)), "")
    best = sorted(prefix for prefix in prefixes if found[prefix] == most)
    if len(best) > 1 and "" not in best:
        raise ValueError(
            f"load_weights: weights must hold one backbone, got {len(best)} in {source}, under {', '.join(best)}; load "
            "the file with read_weights and give load_weights the tensors of one"
        )
    return best[0]


def _spcl_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool | None]:
    """SpCL's names of a backbone to ours, and whether that network had a ReLU in its stem (None: not such names).

    There ``base`` is a Sequential of conv1, bn1, [relu], maxpool, layer1, ...: the children's numbers tell of the ReLU.
    """
    if "base.0.weight" not in state:
        return state, None
    stem_relu = not any(name.startswith("base.3.") for name in state)
    first = 4 if stem_relu else 3
    names = {"base.0.": "backbone.conv1.", "base.1.": "backbone.bn1."}
    names |= {f"base.{first + i}.": f"backbone.layer{i + 1}." for i in range(4)}
    renamed = {}
    for name, tensor in state.items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    return renamed, stem_relu


def _efficientnet_names(
    state: Mapping[str, Tensor], wanted: Sequence[str], arch: str, source: str
) -> dict[str, Tensor]:
    """The names of efficientnet-pytorch to timm's.

    There all blocks have one count, here one in each stage; a block without expansion has one convolution less, and
    numbers its norms alike. These are TensorFlow's weights, which need TensorFlow's padding and epsilon.
    """
    if "tf_efficientnet" not in arch:
        raise ValueError(f"load_weights: arch must be timm/tf_efficientnet_... for {source}, got {arch}")
    ours = dict.fromkeys(match[0] for name in wanted if (match := re.match(r"blocks\.\d+\.\d+\.", name)))
    count = 1 + max((int(match[1]) for name in state if (match := _BLOCK_NORM.match(name))), default=-1)
    if count != len(ours):
        raise ValueError(f"load_weights: weights must hold the {len(ours)} blocks of {arch}, got {count} in {source}")
    top = {
        "_conv_stem.": "conv_stem.",
        "_bn0.": "bn1.",
        "_conv_head.": "conv_head.",
        "_bn1.": "bn2.",
        "_fc.": "classifier.",
    }
    se = {"_se_reduce.": "se.conv_reduce.", "_se_expand.": "se.conv_expand."}
    narrow = {"_depthwise_conv.": "conv_dw.", "_bn1.": "bn1.", "_project_conv.": "conv_pw.", "_bn2.": "bn2."} | se
    wide = {
        "_expand_conv.": "conv_pw.", "_bn0.": "bn1.", "_depthwise_conv.": "conv_dw.", "_bn1.": "bn2.",
        "_project_conv.": "conv_pwl.", "_bn2.": "bn3.",
    } | se  # fmt: skip
    names = dict(top)
    for number, block in enumerate(ours):
        kind = wide if f"_blocks.{number}._expand_conv.weight" in state else narrow
        names |= {f"_blocks.{number}.{old}": block + new for old, new in kind.items()}
    renamed = {}
    for name, tensor in state.items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    return renamed


def _refuse_jigsaw(tensors: Mapping[str, Tensor], source: str) -> None:
    """TransReID with its jigsaw branch trains copies of the last block, and leaves the backbone's own untrained."""
    if any(name.startswith("b1.0.") for name in tensors) and any(name.startswith("b2.0.") for name in tensors):
        raise ValueError(
            f"load_weights: weights must be of a network with one branch, got {source}, a TransReID checkpoint whose "
            "last block is trained in its branches b1 and b2 (JPM)"
        )
