# SPDX-License-Identifier: Apache-2.0
"""Fitting weights to a network, all of them or none.

Understood: torchvision, IBN-Net and timm files, checkpoints of this library and of the Re-ID code bases that
``published_names.py`` lists; bare or inside a ``state_dict`` or ``teacher`` entry, with or without the ``module.``
that DataParallel puts before every name.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fastreid_u.models.published_names import Checkpoint, backbone_prefix, under_our_names
from fastreid_u.models.reid import ReIDModel
from fastreid_u.models.resnet import RESNETS
from fastreid_u.models.timm_backbone import TimmBackbone
from fastreid_u.models.weight_files import named_tensors, read_weights

# Beside parameters: counters of BatchNorm and of profilers, which change no feature.
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
# Parts of a backbone's file that are no backbone: what a pre-training put on top of it, or in hidden parts' place.
_HEAD = re.compile(r"(fc|classifier|heads?|head_dist|projector|predictor|decoder|mask_token|masked_embed)(\.|$)")


@dataclass(frozen=True)
class WeightsReport:
    """What a file gave: its name, how many tensors were used, and which of its tensors had no place."""

    source: str
    loaded: int
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.source} ({self.loaded} tensors"
        if self.ignored:
            text += f"; ignored {', '.join(self.ignored[:4])}"
            text += f" and {len(self.ignored) - 4} more" if len(self.ignored) > 4 else ""
        return text + ")"


def load_weights(model: ReIDModel, weights: str | Path | Mapping[str, Tensor], source: str = "") -> WeightsReport:
    """Copy weights into ``model``, in place.

    A backbone's file fills the backbone; a Re-ID checkpoint fills pooling and neck too. The backbone must be filled
    entirely, and the file's backbone must be used entirely: a network that is half random, or that has lost half of
    its blocks, looks like one that trains badly. Only heads (classifiers, projections) may stay without a place; the
    report lists them. Learned positions of another grid of patches are resampled, unless a run of ours wrote them.

    Args:
        model: from ``build_model``.
        weights: a file, or what ``read_weights`` gave, or another state dict.
        source: name for the report; the file's name if empty.

    Raises:
        ValueError: a tensor of the backbone is missing, has another shape, or has no place in this one; or the
            checkpoint was trained with another pooling or stem. Names, and both shapes, are in the message. ``model``
            is unchanged.
    """
    if isinstance(weights, (str, Path)):
        source = source or Path(weights).name
        weights = read_weights(weights)
    source = source or "a state dict"
    found = under_our_names(named_tensors(weights), model, source)
    state, inner, own = found.tensors, backbone_prefix(model), model.state_dict()
    if isinstance(model.backbone, TimmBackbone) and not found.ours and f"{inner}pos_embed" in state:
        state[f"{inner}pos_embed"] = model.backbone.resampled_positions(state[f"{inner}pos_embed"])

    def shown(names: list[str]) -> list[str]:
        return names if found.whole else [name.removeprefix(inner) for name in names]

    _check_head(model, found, source)
    missing = [n for n in own if n.startswith("backbone.") and n not in state and not n.endswith(_COUNTERS)]
    if missing:
        wanted = sum(name.startswith("backbone.") for name in own)
        raise ValueError(
            f"load_weights: weights must hold every tensor of the backbone ({model.arch}), got {source}, which lacks "
            f"{len(missing)} of {wanted}: {_listed(shown(missing))}"
        )
    extra = [name for name in state if name not in own]
    unplaced = [name for name in extra if name.startswith(inner) and not _is_head(model, name.removeprefix(inner))]
    if not found.whole:  # a part of the file that this backbone has not at all is a head, by whatever name
        parts = {name.removeprefix(inner).partition(".")[0] for name in own if name.startswith(inner)}
        unplaced = [name for name in unplaced if name.removeprefix(inner).partition(".")[0] in parts]
    if unplaced:
        raise ValueError(
            f"load_weights: weights must be of the backbone that is built ({model.arch}), got {source}, which holds "
            f"{len(unplaced)} more tensors of a backbone: {_listed(shown(unplaced))}"
        )
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in fitting.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"load_weights: {shown([name])[0]} must have shape {tuple(own[name].shape)} for {model.arch}, "
                f"got {tuple(tensor.shape)} in {source}"
            )
    model.load_state_dict(fitting, strict=False)
    return WeightsReport(source, len(fitting), tuple(shown(extra)))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _is_head(model: ReIDModel, name: str) -> bool:
    """Whether a backbone that works without the tensor ``name`` (a backbone file's) is the same network."""
    if name.endswith(_COUNTERS) or _HEAD.match(name) or ".BN_S." in name:  # SpCL's BatchNorms of the source domain
        return True
    if not isinstance(model.backbone, TimmBackbone):
        return False
    net = model.backbone.net
    classifiers = net.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return name.startswith(tuple(f"{part}." for part in classifiers)) or name in dict(net.named_buffers())


def _check_head(model: ReIDModel, found: Checkpoint, source: str) -> None:
    """Pooling, neck and stem of a whole Re-ID network must be those of ``model``."""
    if not found.whole:
        return
    gem = "pooling.p" in found.tensors
    if gem != ("pooling.p" in model.state_dict()):
        rule = "be 'gem'" if gem else "not be 'gem'"
        raise ValueError(f"load_weights: pooling of the model must {rule} for {source}, got {model.pooling}")
    neck = [f"bnneck.{part}" for part in ("weight", "running_mean", "running_var")]
    if 0 < sum(name in found.tensors for name in neck) < len(neck):
        lost = ", ".join(name for name in neck if name not in found.tensors)
        raise ValueError(f"load_weights: weights must hold the whole neck or none, got {source}, which lacks {lost}")
    if not hasattr(model.backbone, "relu"):
        return
    has_relu = isinstance(model.backbone.relu, nn.ReLU)
    if found.stem_relu is not None and has_relu != found.stem_relu:
        raise ValueError(f"load_weights: stem_relu must be {found.stem_relu} for {source}, got {has_relu}")
    if found.strong_baseline and has_relu:
        warnings.warn(
            f"load_weights: {source} has the names of reid-strong-baseline, whose ResNets have no ReLU after the stem; "
            "if it comes from there, stem_relu must be False",
            stacklevel=3,
        )


def imagenet_file(arch: str, version: str = "imagenet") -> Path:
    """The file of ImageNet weights of a ResNet, downloaded on first use into torch hub's folder; its hash is checked.

    Of torchvision's, "imagenet" is the first version (V1), which nearly all published runs used, and "imagenet_v2" the
    second, from a longer training; results that start from one are not to be compared with those from the other.

    Raises:
        ValueError: none exist for ``arch``.
        RuntimeError: the download failed; the message names the place for the file.
    """
    url = RESNETS[arch].imagenet
    if url is None:
        raise ValueError(f"build_model: weights must be None or a file for {arch}, which has none, got {version!r}")
    if url == "torchvision":
        from torchvision.models import get_model_weights

        wanted = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2"}[version]
        if wanted not in get_model_weights(arch).__members__:
            raise ValueError(f"build_model: weights must be 'imagenet' for {arch}, which has no V2, got {version!r}")
        url = get_model_weights(arch)[wanted].url
    elif version != "imagenet":
        raise ValueError(f"build_model: weights must be 'imagenet' for {arch}, which has no V2, got {version!r}")
    name = Path(urlparse(url).path).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / name).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # the name ends in the first digits of the file's SHA-256
            digest = re.search(r"-([0-9a-f]{8,})\.", name)
            torch.hub.download_url_to_file(url, str(folder / name), digest and digest[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"build_model: could not download the ImageNet weights of {arch} ({error}). Without a network, put "
                f"{name} into {folder}, or give weights=<path of the file>, or weights=None for random weights"
            ) from error
    return folder / name
