# SPDX-License-Identifier: Apache-2.0
"""The fixed view of a camera: ground in perspective, a far side, things standing about."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastreid_u.data.synthetic.camera import Camera
from fastreid_u.data.synthetic.cloth import noise_tile

WIDTH, HEIGHT, FOCAL = 1280, 576, 1000.0  # frame, pixels


@dataclass(frozen=True)
class Scene:
    """``picture``: the empty frame (display values of the albedo in the camera's light); ``horizon``: its row."""

    picture: Image.Image
    horizon: float
    lens: float  # height of the lens, metres
    walk: tuple[float, float]  # rows where people's feet may stand

    def pixels_per_metre(self, row: float) -> float:
        return (row - self.horizon) / self.lens

    def distance(self, row: float) -> float:
        return FOCAL * self.lens / (row - self.horizon)


def make_scene(rng: np.random.Generator, camera: Camera) -> Scene:
    """Paint the frame of a camera."""
    horizon = float(rng.uniform(-60, 60))
    far = float(rng.uniform(9, 30))  # metres to the far side
    kerb = horizon + FOCAL * camera.height / far
    kerb = min(kerb, 0.5 * HEIGHT)
    far = FOCAL * camera.height / (kerb - horizon)
    picture = _ground(rng, camera, horizon)
    draw = Picture(picture, horizon, camera.height)
    _far_side(rng, draw, far)
    _things(rng, draw, far)
    light = np.array(camera.light.sky_colour) + 0.45 * np.array(camera.light.sun_colour)
    patches = noise_tile(int(rng.integers(100)), 256, 0.3, 0.012, 0.012)
    patches = np.asarray(Image.fromarray(patches).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    values = np.asarray(draw.image, np.float32) / 255
    values *= np.sqrt(np.clip(light, 0.2, 2.0)).astype(np.float32) * (1 + 0.06 * patches[..., None])
    values = values.mean((0, 1)) + np.float32(0.75) * (values - values.mean((0, 1)))  # haze: what is far is dull
    final = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.0))
    # people pass where they are 110 to 330 pixels tall, on this side of the kerb
    low, high = (horizon + tall / 1.75 * camera.height for tall in (110, 330))
    low = max(low, kerb + 6)
    return Scene(final, horizon, camera.height, (low, max(low + 30, min(high, 0.95 * HEIGHT))))


class Picture:
    """A frame to draw on in metres: x to the right of the axis, height above the ground, at a distance."""

    def __init__(self, image: Image.Image, horizon: float, lens: float) -> None:
        self.image, self.draw, self.horizon, self.lens = image, ImageDraw.Draw(image), horizon, lens

    def at(self, x: float, y: float, distance: float) -> tuple[float, float]:
        k = FOCAL / distance
        return WIDTH / 2 + x * k, self.horizon + (self.lens - y) * k

    def soften(self) -> None:
        """Blur what was drawn so far: it lies farther away than what comes."""
        self.image = self.image.filter(ImageFilter.GaussianBlur(1.2))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x0, y0, x1, y1, distance, colour) -> None:
        (left, low), (right, high) = self.at(x0, y0, distance), self.at(x1, y1, distance)
        if right - left >= 1 and low - high >= 1:
            self.draw.rectangle((left, high, right, low), fill=_rgb(colour))

    def polygon(self, points, distance, colour) -> None:
        self.draw.polygon([self.at(x, y, distance) for x, y in points], fill=_rgb(colour))

    def ellipse(self, x, y, rx, ry, distance, colour=None, outline=None, width=1) -> None:
        (left, low), (right, high) = self.at(x - rx, y - ry, distance), self.at(x + rx, y + ry, distance)
        fill = None if colour is None else _rgb(colour)
        line = None if outline is None else _rgb(outline)
        self.draw.ellipse((left, high, right, low), fill=fill, outline=line, width=max(round(width), 1))

    def line(self, points, distance, colour, width) -> None:
        k = FOCAL / distance
        self.draw.line([self.at(x, y, distance) for x, y in points], fill=_rgb(colour), width=max(round(width * k), 1))


def _rgb(colour) -> tuple[int, int, int]:
    return tuple(int(np.clip(255 * c, 0, 255)) for c in colour)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour of the street: some grey, rarely bright."""
    return np.clip(rng.uniform(0.12, 0.65) * np.exp(rng.normal(0, rng.choice((0.06, 0.3)), 3)), 0.05, 0.85)


def _ground(rng: np.random.Generator, camera: Camera, horizon: float) -> Image.Image:
    rows, cols = np.arange(HEIGHT, dtype=np.float32)[:, None], np.arange(WIDTH, dtype=np.float32)[None]
    depth = FOCAL * camera.height / np.maximum(rows - horizon, 4)
    x = (cols - WIDTH / 2) * depth / FOCAL
    kind = ("asphalt", "slabs", "bricks", "grass", "concrete", "floor")[int(rng.integers(6))]
    base = {
        "asphalt": (0.40, 0.40, 0.41),
        "slabs": (0.58, 0.57, 0.54),
        "bricks": (0.52, 0.44, 0.40),
        "grass": (0.33, 0.38, 0.24),
        "concrete": (0.62, 0.61, 0.58),
        "floor": (0.66, 0.65, 0.63),
    }[kind]
    tile = noise_tile(int(rng.integers(100, 200)), 512, 0.2, 0.15, 0.15)
    fine = tile[(depth * 25).astype(np.int32) % 512, (x * 25).astype(np.int32) % 512]
    coarse = tile[(depth * 5).astype(np.int32) % 512, (x * 5).astype(np.int32) % 512]
    fade = np.clip(8 / depth, 0.15, 1)  # texture dies away with distance
    value = 1 + (0.16 if kind == "grass" else 0.07) * fine * fade + 0.05 * coarse
    if kind in ("slabs", "bricks", "floor"):
        size = {"slabs": 0.6, "bricks": 0.25, "floor": 0.9}[kind]
        turn = rng.uniform(0, 0.6)
        a, b = x * np.cos(turn) - depth * np.sin(turn), x * np.sin(turn) + depth * np.cos(turn)
        width = 0.03 + 0.0015 * depth
        joint = (np.mod(a, size) < width) | (np.mod(b, size) < width)
        value = value * np.where(joint, 1 - 0.25 * fade, 1)
        cell = np.mod(np.floor(a / size) * 12.9898 + np.floor(b / size) * 78.233, 7.0) / 7.0
        value = value * (0.95 + 0.10 * cell)
    value = value * (1 + 0.05 * rng.standard_normal((HEIGHT, WIDTH), np.float32))
    out = value[..., None] * np.array(base, np.float32) * rng.uniform(0.75, 1.1)
    if rng.random() < 0.6:  # a strip of another surface: road, path or lawn
        middle, half = rng.uniform(8, 20), rng.uniform(1, 3)
        strip = np.abs(depth + 0.3 * x * rng.uniform(-1, 1) - middle) < half
        colour = ((0.33, 0.33, 0.34), (0.33, 0.38, 0.24), (0.60, 0.58, 0.54))[int(rng.integers(3))]
        out = np.where(strip[..., None], value[..., None] * np.array(colour, np.float32), out)
    return Image.fromarray((np.clip(out, 0, 1) * 255).astype(np.uint8))


def _far_side(rng: np.random.Generator, draw: Picture, far: float) -> None:
    span = WIDTH / 2 * far / FOCAL + 2
    kind = ("shops", "brick", "hedge", "glass", "concrete")[int(rng.integers(5))]
    wall = rng.choice(
        ((0.62, 0.58, 0.52), (0.50, 0.36, 0.30), (0.55, 0.56, 0.57), (0.72, 0.70, 0.66), (0.45, 0.43, 0.40))
    )
    wall = np.asarray(wall) * rng.uniform(0.75, 1.1)
    draw.box(-span, 0, span, 12, far, wall)
    if kind == "hedge":
        _foliage(rng, draw, -span, span, 0, rng.uniform(1.2, 4.5), far, 0.05)
    x = -span
    while x < span:
        if kind == "shops":
            w = rng.uniform(2.0, 4.5)
            draw.box(x + 0.15, 0.3, x + w - 0.15, 2.5, far, wall * rng.uniform(0.2, 0.45))
            for _ in range(8):
                gx, gy = x + rng.uniform(0.2, w - 0.6), rng.uniform(0.3, 2.0)
                draw.box(gx, gy, gx + rng.uniform(0.1, 0.5), gy + rng.uniform(0.1, 0.5), far, _muted(rng))
            draw.box(x + 0.1, 2.6, x + w - 0.1, 3.2, far, _muted(rng))
        elif kind in ("brick", "concrete"):
            w = rng.uniform(1.8, 3.5)
            draw.box(x + 0.5, rng.uniform(0, 1.1), x + w - 0.5, 2.6, far, wall * rng.uniform(0.25, 0.7))
            draw.box(x, 0, x + 0.08, 8, far, wall * 0.8)
        elif kind == "glass":
            w = rng.uniform(0.9, 1.6)
            draw.box(x + 0.05, 0.1, x + w - 0.05, 3.4, far, np.array((0.30, 0.36, 0.38)) * rng.uniform(0.5, 1.5))
        else:
            w = 3.0
        x += w
    draw.box(-span, 0, span, 0.12, far, wall * 0.6)


def _foliage(rng, draw: Picture, x0, x1, y0, y1, distance, grain) -> None:
    green = np.array((0.22, 0.32, 0.15)) * rng.uniform(0.7, 1.2)
    draw.box(x0, y0, x1, y1 * 0.93, distance, green * 0.7)
    for _ in range(int(min(900, 60 * (x1 - x0)))):
        x, y, r = rng.uniform(x0, x1), y0 + (y1 - y0) * rng.beta(1.3, 1.0), rng.uniform(0.5, 1.6) * grain * 3
        draw.ellipse(x, y, r, r, distance, green * rng.uniform(0.5, 1.5))


def _things(rng: np.random.Generator, draw: Picture, far: float) -> None:
    near = max(0.45 * far, FOCAL * draw.lens / (0.62 * HEIGHT - draw.horizon))
    for number, distance in enumerate(sorted(rng.uniform(min(near, 0.9 * far), far * 0.98, 16), reverse=True)):
        span = WIDTH / 2 * distance / FOCAL
        x, kind = rng.uniform(-span, span), int(rng.integers(7))
        if number % 5 == 0:
            draw.soften()
        if kind not in (0, 1, 2):
            draw.ellipse(x, 0.0, 0.6, 0.10, distance, (0.22, 0.22, 0.22))
        if kind == 0:
            _car(rng, draw, x, distance)
        elif kind in (1, 2):
            for i in range(int(rng.integers(1, 6))):
                _bicycle(rng, draw, x + 0.55 * i, distance)
        elif kind == 3:  # tree
            draw.line([(x, 0), (x, 3.5)], distance, (0.26, 0.21, 0.17), 0.22)
            _foliage(rng, draw, x - 1.2, x + 1.2, 2.4, 5.0, distance, 0.12)
        elif kind == 4:  # post with a sign
            draw.line([(x, 0), (x, 5)], distance, (0.35, 0.36, 0.37), 0.10)
            draw.box(x - 0.25, 1.9, x + 0.25, 2.5, distance, _muted(rng))
        elif kind == 5:  # bin or planter
            w, h = rng.uniform(0.25, 0.7), rng.uniform(0.6, 1.0)
            draw.box(x - w, 0, x + w, h, distance, _muted(rng))
            if rng.random() < 0.5:
                _foliage(rng, draw, x - w, x + w, h, h + 0.6, distance, 0.05)
        else:  # bench
            draw.box(x - 0.8, 0.4, x + 0.8, 0.5, distance, (0.40, 0.30, 0.20))
            draw.box(x - 0.8, 0.65, x + 0.8, 0.9, distance, (0.36, 0.27, 0.18))
            draw.box(x - 0.7, 0, x - 0.6, 0.45, distance, (0.2, 0.2, 0.2))
            draw.box(x + 0.6, 0, x + 0.7, 0.45, distance, (0.2, 0.2, 0.2))


def _car(rng, draw: Picture, x, distance) -> None:
    paint = np.array(
        ((0.75, 0.75, 0.75), (0.12, 0.12, 0.13), (0.45, 0.46, 0.48), (0.38, 0.13, 0.13), (0.17, 0.21, 0.32))[
            int(rng.integers(5))
        ]
    )
    draw.ellipse(x, 0.05, 2.3, 0.12, distance, (0.18, 0.18, 0.18))
    draw.polygon(
        [
            (x - 2.1, 0.3),
            (x - 2.1, 0.85),
            (x - 1.3, 0.95),
            (x - 0.8, 1.45),
            (x + 0.9, 1.45),
            (x + 1.5, 0.95),
            (x + 2.1, 0.85),
            (x + 2.1, 0.3),
        ],
        distance,
        paint,
    )
    draw.polygon([(x - 1.15, 0.95), (x - 0.75, 1.38), (x + 0.05, 1.38), (x + 0.05, 0.95)], distance, (0.13, 0.16, 0.18))
    draw.polygon([(x + 0.15, 0.95), (x + 0.15, 1.38), (x + 0.85, 1.38), (x + 1.35, 0.95)], distance, (0.13, 0.16, 0.18))
    for wheel in (-1.3, 1.3):
        draw.ellipse(x + wheel, 0.32, 0.33, 0.33, distance, (0.08, 0.08, 0.08))
        draw.ellipse(x + wheel, 0.32, 0.17, 0.17, distance, (0.5, 0.5, 0.5))


def _bicycle(rng, draw: Picture, x, distance) -> None:
    k, frame = FOCAL / distance, _muted(rng)
    for wheel in (-0.52, 0.52):
        draw.ellipse(x + wheel, 0.34, 0.33, 0.33, distance, outline=(0.10, 0.10, 0.10), width=0.05 * k)
    path = [(x - 0.52, 0.34), (x - 0.15, 0.85), (x + 0.40, 0.80), (x + 0.52, 0.34)]
    draw.line(path, distance, frame, 0.05)
    draw.line([(x - 0.15, 0.85), (x, 0.32), (x + 0.40, 0.80)], distance, frame, 0.05)
    draw.line([(x + 0.40, 0.80), (x + 0.37, 1.0), (x + 0.22, 1.02)], distance, (0.12, 0.12, 0.12), 0.05)
    draw.line([(x - 0.28, 0.92), (x - 0.05, 0.92)], distance, (0.08, 0.08, 0.08), 0.08)
