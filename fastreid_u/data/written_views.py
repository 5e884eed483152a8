# SPDX-License-Identifier: Apache-2.0
"""Views written straight into a batch: the same bits as ``View``, without a tensor for each step and a copy of all.

The steps that end nearly every view (mirror, shift, normalise, erase) become one pass over an image while it is in the
processor's cache, from its uint8 pixels to its place in the float32 batch. Draws come from the image's own generator in
the order of the steps, as in ``View``.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fastreid_u.data.transforms import Blur, ColorJitter, Erase, Flip, Grey, Normalize, PadCrop, Step, View, moved

_ON_PIXELS = (ColorJitter, Grey, Flip, PadCrop, Blur)  # uint8 to uint8
_LAST = (Flip, PadCrop, Normalize, Erase)  # in this order, where they are there


@dataclass(frozen=True)
class WrittenView:
    """A view whose last steps are one.

    Attributes:
        before: the steps before them.
        flip, shift, normalize, erase: the last steps; None for those that the view does not have.
    """

    before: tuple[Step, ...]
    flip: Flip | None
    shift: PadCrop | None
    normalize: Normalize
    erase: Erase | None

    @property
    def draws(self) -> bool:
        """Whether the view draws anything, so that it needs a generator."""
        return bool(self.before or self.flip or self.shift or self.erase)

    def write(self, image: torch.Tensor, rng: np.random.Generator | None, out: np.ndarray) -> None:
        """What the view makes of ``image`` (3, H, W) uint8, into ``out`` (3, H, W) float32."""
        for step in self.before:
            image = step(image, rng)
        pixels = image.numpy()
        if self.flip and self.flip.draw(rng):
            pixels = pixels[..., ::-1]
        if self.shift:
            pixels = moved(pixels, *self.shift.draw(rng))
        self.normalize.write(pixels, out)
        place = self.erase.draw(rng, *out.shape[-2:]) if self.erase else None
        if place is not None:
            out[:, place[0], place[1]] = np.array(self.erase.fill, np.float32)[:, None, None]


def written(view: View) -> WrittenView | None:
    """``view`` in this form, or None where it has steps of somebody's own, or does not normalise."""
    steps, last = list(view.steps), {}
    for kind in reversed(_LAST):
        if steps and type(steps[-1]) is kind:
            last[kind] = steps.pop()
    if Normalize not in last or not all(type(step) in _ON_PIXELS for step in steps):
        return None
    return WrittenView(tuple(steps), last.get(Flip), last.get(PadCrop), last[Normalize], last.get(Erase))
