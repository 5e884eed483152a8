# SPDX-License-Identifier: Apache-2.0
"""Things between the camera and the person."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def stand_in_front(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a rail, post, bin, bush, bicycle or car bonnet over ``picture`` (linear RGB, changed in place)."""
    height, width = picture.shape[:2]
    grow = 4
    mask = Image.new("L", (width * grow, height * grow))
    draw = ImageDraw.Draw(mask)
    kind = ("post", "rail", "bin", "bush", "bicycle", "bonnet")[int(rng.integers(6))]
    colour = rng.uniform(0.03, 0.40) * np.exp(rng.normal(0, 0.15, 3))
    h, w = height * grow, width * grow
    if kind == "post":
        x, half = rng.uniform(0.15, 0.85) * w, rng.uniform(0.03, 0.07) * w
        draw.rectangle((x - half, 0, x + half, h), fill=255)
    elif kind == "rail":
        y, thick = rng.uniform(0.5, 0.75) * h, 0.012 * h
        draw.rectangle((0, y - thick, w, y + thick), fill=255)
        draw.rectangle((0, y + 0.13 * h - thick, w, y + 0.13 * h + thick), fill=255)
        start = rng.uniform(0, 0.5) * w
        for x in (start, start + 0.55 * w):
            draw.rectangle((x - thick, y, x + thick, h), fill=255)
    elif kind == "bin":
        x, half, top = rng.uniform(0.1, 0.9) * w, rng.uniform(0.14, 0.28) * w, rng.uniform(0.62, 0.78) * h
        draw.rounded_rectangle((x - half, top, x + half, 1.1 * h), radius=0.05 * w, fill=255)
    elif kind == "bush":
        top = rng.uniform(0.66, 0.82) * h
        for _ in range(70):
            x, y, r = rng.uniform(0, w), top + 0.4 * h * rng.beta(1, 1.2), rng.uniform(0.03, 0.09) * w
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        colour = np.array((0.10, 0.16, 0.06)) * rng.uniform(0.6, 1.6)
    elif kind == "bicycle":
        r, y, x = 0.30 * w, 0.86 * h, rng.uniform(-0.1, 0.5) * w
        for centre in (x, x + 0.95 * w):
            draw.ellipse((centre - r, y - r, centre + r, y + r), outline=255, width=round(0.04 * w))
        bars = [(x, y), (x + 0.3 * w, y - 0.21 * h), (x + 0.8 * w, y - 0.20 * h), (x + 0.95 * w, y), (x + 0.42 * w, y)]
        draw.line([*bars, (x + 0.3 * w, y - 0.21 * h)], fill=255, width=round(0.05 * w))
        draw.line(
            [(x + 0.42 * w, y), (x + 0.8 * w, y - 0.2 * h), (x + 0.74 * w, y - 0.28 * h)],
            fill=255,
            width=round(0.05 * w),
        )
    else:
        top = rng.uniform(0.70, 0.82) * h
        lean = rng.uniform(-0.1, 0.1) * h
        draw.polygon([(0, top + lean), (0.7 * w, top - 0.02 * h), (w, top - lean), (w, h), (0, h)], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(grow * 0.4)).resize((width, height), Image.Resampling.BOX)
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    slope = (
        np.linspace(1.15, 0.8, height, dtype=np.float32)[:, None, None]
        * np.linspace(0.9, 1.1, width, dtype=np.float32)[None, :, None]
    )
    value = np.clip(colour, 0.02, 0.8).astype(np.float32) * slope
    if kind in ("bin", "bonnet"):  # a lid's or panel's edge
        edge = round(top / grow) + 4
        value = np.broadcast_to(value, picture.shape).copy()
        value[edge : edge + 2] *= 0.4
    elif kind == "bush":
        value = value * rng.uniform(0.5, 1.6, (height, width, 1)).astype(np.float32)
    picture *= 1 - alpha
    picture += alpha * value
