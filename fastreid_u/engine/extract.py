# SPDX-License-Identifier: Apache-2.0
"""Features of a list of images, in its order; and what is done about images that cannot be read."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastreid_u.engine.display import Display

if TYPE_CHECKING:
    from fastreid_u.data import BadImage, ReIDLoader, Sample

BAD_SHARE = 0.05  # past this share of unreadable images, the folder is more likely wrong than damaged


class TooManyBadImages(RuntimeError):
    """More than 5 % of a split's images cannot be read."""


class BadImageLog:
    """Reports each unreadable image once and stops the run when there are too many of them.

    Args:
        total: images in the split.
        display: where the paths are named.
        share: what is too many; 1 never stops.
    """

    def __init__(self, total: int, display: Display, *, share: float = BAD_SHARE) -> None:
        self.total = total
        self.display = display
        self.share = share
        self.reasons: dict[str, str] = {}

    def note(self, bad: Iterable["BadImage"]) -> None:
        for image in bad:
            if image.path not in self.reasons:
                self.reasons[image.path] = image.reason
                self.display.line(f"warning: left out, cannot be read: {image.path} ({image.reason})")
        if len(self.reasons) > self.share * self.total:
            named = "\n".join(f"  {path}: {reason}" for path, reason in list(self.reasons.items())[:10])
            raise TooManyBadImages(
                f"{len(self.reasons)} of {self.total} images cannot be read, more than {self.share:.0%}; the first:\n"
                + named
            )


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    loader: "ReIDLoader",
    samples: "Sequence[Sample]",
    *,
    display: Display,
    log: BadImageLog,
    device: torch.device,
    autocast: bool = False,
    name: str = "extract",
) -> Tensor:
    """Unit features (N, D) float32 on ``device`` of the loader's ``samples``; rows of unreadable images are NaN.

    Raises:
        FloatingPointError: the network gives NaN or infinity for readable images (it has diverged).
        TooManyBadImages: more of the images than ``log`` allows cannot be read.
        ValueError: none of them can.
    """
    model.eval()
    count = len(samples)
    features, unreadable = None, 0
    with display.phase(name, count) as advance:
        for batch in loader:
            log.note(batch.bad)
            unreadable += len(batch.bad)
            if len(batch.indices):
                images = batch.images.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                    rows = model(images).float()
                if features is None:
                    features = torch.full((count, rows.shape[1]), torch.nan, dtype=torch.float32, device=device)
                features[batch.indices.to(device)] = rows
            advance(len(batch.indices) + len(batch.bad))
    if features is None:
        first = "".join(f", {path}: {reason}" for path, reason in list(log.reasons.items())[:1])
        raise ValueError(f"{name}: images must hold one that can be read, got {unreadable} that cannot{first}")
    wrong = (~torch.isfinite(features).all(dim=1)).sum().item() - unreadable
    if wrong > 0:
        raise FloatingPointError(
            f"{name}: features of {wrong} of {count} images are NaN or infinite; the network has diverged. "
            "Lower lr, or use float32 (amp=off)"
        )
    return features
