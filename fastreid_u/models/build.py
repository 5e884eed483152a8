# SPDX-License-Identifier: Apache-2.0
"""From an architecture's name to a network with weights."""

import difflib
import importlib.util
import threading
from pathlib import Path

import torch
from torch import nn

from fastreid_u._default_device import on_cpu
from fastreid_u.models.batchnorm import set_bn_group
from fastreid_u.models.pooling import make_pooling
from fastreid_u.models.reid import ReIDModel
from fastreid_u.models.resnet import ALIASES, RESNETS, ResNet
from fastreid_u.models.timm_backbone import TimmBackbone
from fastreid_u.models.weights import imagenet_file, load_weights
from fastreid_u.pixel_norm import named

_drawing = threading.Lock()


def model_names() -> list[str]:
    """Architectures that ``build_model`` has itself; ``timm/<name>`` comes on top where timm is installed."""
    return list(RESNETS)


def pretrained_norm(arch: str) -> str | None:
    """The ``Config.pixel_norm`` that the published weights of ``arch`` were trained with; None where it is unknown."""
    arch = ALIASES.get(arch, arch)
    if arch in RESNETS:
        return "imagenet"
    if not arch.startswith("timm/") or importlib.util.find_spec("timm") is None:
        return None  # which build_model refuses
    import timm

    about = timm.get_pretrained_cfg(arch.removeprefix("timm/"))
    return named(about.mean, about.std) if about is not None and len(about.mean) == len(about.std) == 3 else None


def build_model(
    arch: str = "resnet50",
    *,
    pooling: str = "gem",
    weights: str | Path | None = "imagenet",
    bn_group: int | None = None,
    bn_running: str = "first",
    last_stride: int = 1,
    stem_relu: bool = True,
    drop_path: float = 0.0,
    image_size: tuple[int, int] = (256, 128),
    seed: int | None = None,
) -> ReIDModel:
    """Build a Re-ID network: backbone, pooling, BNNeck, rows of unit length.

    Args:
        arch: one of ``model_names()``, an alias ("ibn50a", "ibn101a"), or "timm/<name>".
        pooling: "gem" (learnable exponent, starts at 3), "avg" or "max". Not used by timm's token networks.
        weights: "imagenet", "imagenet_v2" (torchvision's second version), the path of a file (see
            :mod:`fastreid_u.models.weights`), or None for random weights. Nothing is replaced silently: weights that
            cannot be had, or do not fit, are an error.
        bn_group: images per BatchNorm group in training, None for the whole batch.
        bn_running: "first" or "mean": the groups that the running statistics come from.
        last_stride: stride of the last stage, 1 or 2. ResNets of ``model_names()`` only.
        stem_relu: False leaves out the ReLU after the stem, as published CAP does. ResNets of ``model_names()`` only.
        drop_path: stochastic depth of timm's networks in training, in [0, 1).
        image_size: (height, width) of the images that will come. Positions of transformers are fitted to it; a timm
            network that takes images of its own size only refuses others here. ResNets take any size.
        seed: of the random weights; torch's global generator is then left as it was. None draws from that generator.

    Returns:
        The network on the CPU, in training mode. ``model.describe()`` tells what was built.

    Raises:
        ValueError: an argument breaks its rule, or the weights do not fit.
        FileNotFoundError: ``weights`` names no file.
        RuntimeError: timm is missing, a download failed, or a file is unreadable.
    """
    arch = ALIASES.get(arch, arch)
    if arch not in RESNETS and not arch.startswith("timm/"):
        known = ", ".join([*RESNETS, *ALIASES])
        raise ValueError(f"build_model: arch must be one of {known} or timm/<name>, got {arch!r}{_meant(arch)}")
    if last_stride not in (1, 2):
        raise ValueError(f"build_model: last_stride must be 1 or 2, got {last_stride!r}")
    if not stem_relu and arch not in RESNETS:
        raise ValueError(
            f"build_model: stem_relu must be True for {arch}, got {stem_relu!r} (--stem-relu in the shell)"
        )
    if weights == "imagenet_v2" and arch not in RESNETS:
        raise ValueError(f"build_model: weights must be 'imagenet', None or a file for {arch}, got {weights!r}")

    if drop_path and arch in RESNETS:
        raise ValueError(f"build_model: drop_path must be 0 for {arch}, got {drop_path!r}")
    file = imagenet_file(arch, weights) if weights in ("imagenet", "imagenet_v2") and arch in RESNETS else weights
    # one thread at a time: weights are drawn from a generator that all share
    with _drawing, on_cpu(), torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reseeds every GPU as well
        if arch in RESNETS:
            backbone = ResNet(RESNETS[arch], last_stride=last_stride, stem_relu=stem_relu)
            card = {"pooling": pooling, "last_stride": last_stride, "stem_relu": stem_relu}
            pool = make_pooling(pooling)
        else:
            name = arch.removeprefix("timm/")
            backbone = TimmBackbone(name, pretrained=weights == "imagenet", drop_path=drop_path, image_size=image_size)
            card = {"pooling": pooling if backbone.gives_map else "the network's own"}
            pool = make_pooling(pooling) if backbone.gives_map else nn.Identity()
        model = ReIDModel(backbone, pool, arch=arch, card=card)

    if file is None or file == "imagenet":  # timm fetched its own
        source = "random" if file is None else "imagenet (timm)"
    else:
        source = str(load_weights(model, file))
    model.card["weights"] = source
    set_bn_group(model, bn_group, bn_running)
    return model


def _meant(arch: str) -> str:
    """The network that was meant by an unknown name: timm's of that name, or ours of one like it."""
    if importlib.util.find_spec("timm") is not None:
        import timm

        if timm.is_model(arch):
            return f"; did you mean timm/{arch}?"
    close = difflib.get_close_matches(arch, [*RESNETS, *ALIASES], n=1)
    return f"; did you mean {close[0]}?" if close else ""
