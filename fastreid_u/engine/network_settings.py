# SPDX-License-Identifier: Apache-2.0
"""Settings that hang on the network: a method's defaults are of its own network, and a run may name another."""

import dataclasses
from collections.abc import Collection

from fastreid_u.config import Config


def fitted_to_network(config: Config, given: Collection[str]) -> Config:
    """``config`` with those defaults changed that its network cannot have, or whose weights want others.

    * ``stem_relu``: a network of timm has its own stem; ``drop_path``: a ResNet has none.
    * ``pixel_norm``: the mean and deviation that the downloaded weights were trained with.

    Settings whose names are ``given`` stay as they are; ``build_model`` refuses what does not fit.
    """
    from fastreid_u.models.build import pretrained_norm

    changed = {}
    timm = config.arch.startswith("timm/")
    if timm and not config.stem_relu and "stem_relu" not in given:
        changed["stem_relu"] = True
    if not timm and config.drop_path and "drop_path" not in given:
        changed["drop_path"] = 0.0
    # A method that names the pixels of weights of its own keeps them until other weights are asked for.
    chosen = {"arch", "weights"} & set(given) or config.pixel_norm == Config.pixel_norm
    if config.weights in ("imagenet", "imagenet_v2") and "pixel_norm" not in given and chosen:
        changed["pixel_norm"] = pretrained_norm(config.arch) or config.pixel_norm
    return dataclasses.replace(config, **changed) if changed else config


def pixel_warning(config: Config) -> str | None:
    """A warning where pixels are normalised otherwise than timm's own weights of this network want them.

    A file holds no mean and deviation. They matter: the network sees other colours than it has learned from.
    """
    from fastreid_u.models.build import pretrained_norm

    wanted = pretrained_norm(config.arch) if config.weights is not None else None
    if not config.arch.startswith("timm/") or wanted in (None, config.pixel_norm):
        return None
    return (
        f"warning: pixel_norm is {config.pixel_norm}, but timm's own weights of {config.arch} want {wanted} "
        f"(--pixel-norm {wanted})"
    )
