# SPDX-License-Identifier: Apache-2.0
"""A camera: where it hangs, the light where it hangs, and what its lens, sensor and encoder do to a picture."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from fastreid_u.data.synthetic.shading import Light


@dataclass(frozen=True)
class Camera:
    """Fixed for a data seed. Colours are linear RGB factors, lengths metres, angles radians."""

    height: float  # of the lens above the ground
    axis: float  # usual walking direction, 0 = towards the camera
    light: Light
    cast: tuple[float, float, float]
    gain: float
    gamma: float
    contrast: float
    saturation: float
    resolution: float  # native pixels per output pixel, 1 = sharp
    blur: float
    noise: float
    quality: int  # JPEG


def make_camera(rng: np.random.Generator, shift: float) -> Camera:
    """Draw a camera; ``shift`` scales how far its colours and exposure lie from the neutral camera."""
    azimuth, elevation = rng.uniform(-1.9, 1.9), rng.uniform(0.6, 1.2)
    sun = (np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation))
    # 0 overcast or indoor, 1 sunny
    direct = float(np.clip(0.6 + shift * rng.normal(0, 0.5), 0.1, 1.1))
    warm = shift * rng.normal(0, 0.15)
    tint = np.array((1 + warm, 1.0, 1 - warm))
    sky = (1.0 - 0.5 * direct) * np.array((0.97, 1.0, 1.04)) * tint
    cast = np.exp(shift * rng.normal(0, 0.20, 3))
    return Camera(
        height=float(rng.uniform(2.2, 4.2)),
        axis=float(rng.uniform(-np.pi, np.pi)),
        light=Light(
            sun=tuple(float(c) for c in sun),
            sun_colour=tuple(float(c) for c in 1.35 * direct * tint * (1.02, 1.0, 0.95)),
            sky_colour=tuple(float(c) for c in sky),
            ground_colour=tuple(float(c) for c in 0.35 * sky),
        ),
        cast=tuple(float(c) for c in cast / cast.mean()),
        gain=float(1.3 * np.exp(shift * rng.normal(0, 0.30))),
        gamma=float(np.exp(shift * rng.normal(0, 0.20))),
        contrast=float(np.exp(shift * rng.normal(0, 0.20))),
        saturation=float(np.exp(shift * rng.normal(-0.1, 0.4))),
        resolution=float(rng.uniform(0.65, 1.0)),
        blur=float(rng.uniform(0.1, 0.6)),
        noise=float(rng.uniform(0.003, 0.011)),
        quality=int(rng.integers(62, 90)),
    )


def develop(camera: Camera, linear: np.ndarray, rng: np.random.Generator) -> bytes:
    """JPEG file of a linear RGB picture (H, W, 3): exposure, resolution, blur, tone, noise, encoder."""
    x = linear * np.array([camera.gain * c * rng.normal(1, 0.01) for c in camera.cast], np.float32)
    x = np.sqrt(np.clip(x, 0, 1.6))  # display values
    x = x - 0.35 * np.maximum(x - 0.8, 0)  # highlights roll off
    if camera.gamma != 1:
        x = x ** np.float32(camera.gamma)
    x = 0.45 + camera.contrast * (x - 0.45)
    grey = (0.30 * x[..., 0] + 0.59 * x[..., 1] + 0.11 * x[..., 2])[..., None]
    x = grey + np.float32(camera.saturation) * (x - grey)
    image = Image.fromarray((np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8))
    size = image.size
    if camera.resolution < 0.98:
        small = (max(round(size[0] * camera.resolution), 8), max(round(size[1] * camera.resolution), 8))
        image = image.resize(small, Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * size[0] / 64))
    grain = rng.standard_normal((size[1], size[0], 3), np.float32) * np.float32(0.4)
    grain += rng.standard_normal((size[1], size[0], 1), np.float32)
    noisy = np.asarray(image, np.float32) + grain * np.float32(255 * camera.noise)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=camera.quality)
    return buffer.getvalue()
