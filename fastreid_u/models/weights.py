# SPDX-License-Identifier: Apache-2.0
"""Reading weight files and fitting them to a network.

Understood: torchvision, IBN-Net and timm files, checkpoints of this library, checkpoints of the Re-ID code bases that
descend from SpCL (``base.0`` ... ``gap.p``, ``feat_bn``), transformers of DINO and TransReID-SSL; bare or inside a
``state_dict`` or ``teacher`` entry, with or without the ``module.`` that DataParallel puts before every name. Nothing
in a file is executed: safetensors, or torch's restricted unpickler.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fastreid_u.models.reid import ReIDModel
from fastreid_u.models.resnet import RESNETS
from fastreid_u.models.timm_backbone import TimmBackbone

_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")
# What torch.load lets through on a damaged or foreign file, besides its own errors; tests/models/test_weights.py makes
# such files.
_DAMAGE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError)
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile


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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU; out of their wrapper and without prefixes.

    ``.safetensors`` is read by that library, anything else by ``torch.load(weights_only=True)``.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: not a weight file, or one that holds other objects than tensors, numbers and text.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: path must be a file, got {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except SafetensorError as error:
            raise RuntimeError(f"read_weights: path must be a safetensors file, got {path}: {error}") from error
    else:
        found = _torch_load(path)
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise RuntimeError(f"read_weights: path must hold a dict of tensors, got a {type(found).__name__} in {path}")
    return _bare_transformer({_strip(name): value for name, value in found.items() if isinstance(value, Tensor)})


class _Discarded:
    """Stands for a NumPy scalar in a checkpoint (its best mAP, say): whatever it is made from is dropped unread."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


def _torch_load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([(_Discarded, name) for name in _NUMPY_SCALAR]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"read_weights: path must hold tensors, numbers and text only, got {path}, whose other objects would have "
            "to be executed. If you trust it, save its state_dict alone where it was made, and load that"
        ) from error
    except _DAMAGE as error:
        raise RuntimeError(
            f"read_weights: path must be a readable weight file, got {path} ({type(error).__name__}: {error})"
        ) from error


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _bare_transformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer that DINO or TransReID-SSL saved inside a larger network, without that network's prefix."""
    prefix = next((p for p in ("backbone.", "base.") if f"{p}patch_embed.proj.weight" in state), None)
    return state if prefix is None else {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def is_reid_checkpoint(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` (of ``read_weights``) is of a whole Re-ID network rather than of a bare backbone."""
    return any(name.startswith(("backbone.", "base.")) for name in state)


def _our_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool | None]:
    """SpCL's names to ours, and whether that network had a ReLU in its stem (None: not such a checkpoint).

    There ``base`` is a Sequential of conv1, bn1, [relu], maxpool, layer1, ...: the children's numbers tell of the ReLU.
    ``gap`` is the pooling, ``feat_bn`` the neck.
    """
    if "base.0.weight" not in state:
        return dict(state), None
    stem_relu = not any(name.startswith("base.3.") for name in state)
    first = 4 if stem_relu else 3
    names = {"base.0.": "backbone.conv1.", "base.1.": "backbone.bn1.", "gap.": "pooling.", "feat_bn.": "bnneck."}
    names |= {f"base.{first + i}.": f"backbone.layer{i + 1}." for i in range(4)}
    renamed = {}
    for name, tensor in state.items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    return renamed, stem_relu


def load_weights(model: ReIDModel, weights: str | Path | Mapping[str, Tensor], source: str = "") -> WeightsReport:
    """Copy weights into ``model``, in place.

    A backbone's file fills the backbone; a Re-ID checkpoint fills pooling and neck too. The backbone must be filled
    entirely: a network that is half random looks like one that trains badly. Tensors without a place (classifiers)
    are listed in the report.

    Args:
        model: from ``build_model``.
        weights: a file, or what ``read_weights`` gave.
        source: name for the report; the file's name if empty.

    Raises:
        ValueError: a tensor of the backbone is missing or has another shape, or the checkpoint was trained with
            another pooling or stem; names, and both shapes, are in the message. ``model`` is unchanged.
    """
    if isinstance(weights, (str, Path)):
        source = source or Path(weights).name
        weights = read_weights(weights)
    source = source or "a state dict"
    state, stem_relu = _our_names(weights)
    if is_reid_checkpoint(state):
        target, required = model, "backbone."
        _check_head(model, state, stem_relu, source)
    else:
        target, required = model.backbone, ""
        if isinstance(target, TimmBackbone):
            target = target.net  # the network that timm's files are of

    own = target.state_dict()
    missing = [n for n in own if n.startswith(required) and n not in state and not n.endswith("num_batches_tracked")]
    if missing:
        wanted = sum(n.startswith(required) for n in own)
        raise ValueError(
            f"load_weights: weights must hold every tensor of the backbone ({model.arch}), got {source}, which lacks "
            f"{len(missing)} of {wanted}: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in fitting.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"load_weights: {name} must have shape {tuple(own[name].shape)} for {model.arch}, "
                f"got {tuple(tensor.shape)} in {source}"
            )
    target.load_state_dict(fitting, strict=False)
    return WeightsReport(source, len(fitting), tuple(name for name in state if name not in own))


def _check_head(model: ReIDModel, state: Mapping[str, Tensor], stem_relu: bool | None, source: str) -> None:
    gem = "pooling.p" in state
    if gem != ("pooling.p" in model.state_dict()):
        rule = "be 'gem'" if gem else "not be 'gem'"
        raise ValueError(f"load_weights: pooling of the model must {rule} for {source}, got {model.pooling}")
    if stem_relu is not None and hasattr(model.backbone, "relu"):
        has_relu = isinstance(model.backbone.relu, nn.ReLU)
        if has_relu != stem_relu:
            raise ValueError(f"load_weights: stem_relu must be {stem_relu} for {source}, got {has_relu}")


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
