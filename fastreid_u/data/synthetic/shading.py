# SPDX-License-Identifier: Apache-2.0
"""Tubes to pixels: a depth buffer in which touching tubes melt into one another, then normals, light and shadow.

Melting the depths (a smooth maximum) instead of sorting parts is what makes shoulders, hips and knees look grown
rather than screwed on: the normal is taken from the melted depth, so no part shows its own outline.
"""

from dataclasses import dataclass

import numpy as np

from .body import KNOTS, Tube

FAR = np.float32(-1e4)


@dataclass(frozen=True)
class View:
    """Where the camera stands relative to the person: ``yaw`` 0 sees the face; ``pitch`` looks down; metres, radians."""

    yaw: float
    pitch: float
    distance: float


@dataclass
class Surface:
    """What each pixel shows, all (H, W): depth in pixels (FAR: nothing), tube number, place on the tube."""

    depth: np.ndarray
    part: np.ndarray  # uint8, index of the tube
    v: np.ndarray  # metres along the axis
    lx: np.ndarray  # place on the section's unit circle: -1 right of the person, 1 left
    lz: np.ndarray  # -1 back, 1 front


@dataclass
class Placed:
    """A tube on the image plane; metres until ``fit`` scales it to pixels."""

    ends: np.ndarray  # (2, 3) x right, y down, z towards the camera
    a: np.ndarray
    b: np.ndarray
    shift: np.ndarray


def project(tubes: list[Tube], view: View, stature: float) -> list[Placed]:
    """Perspective of a camera that looks at the middle of the body."""
    sy, cy = np.sin(view.yaw), np.cos(view.yaw)
    sp, cp = np.sin(view.pitch), np.cos(view.pitch)
    placed = []
    for tube in tubes:
        ends = np.stack([tube.top, tube.bottom])
        x, z, y = ends[:, 0] * cy + ends[:, 2] * sy, ends[:, 2] * cy - ends[:, 0] * sy, ends[:, 1] - stature / 2
        near = y * sp + z * cp
        scale = view.distance / (view.distance - near)
        grow = np.linspace(scale[0], scale[1], KNOTS)
        flat = np.stack([x * scale, -(y * cp - z * sp) * scale, near], axis=1)
        placed.append(Placed(flat, tube.a * grow, tube.b * grow, tube.shift * grow))
    return placed


def extent(placed: list[Placed]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the drawing."""
    low = np.min([p.ends[:, :2].min(0) - p.a.max() * 0.8 for p in placed], axis=0)
    high = np.max([p.ends[:, :2].max(0) + p.a.max() * 0.8 for p in placed], axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def fit(placed: list[Placed], scale: float, x: float, y: float) -> list[Placed]:
    """Scale to pixels, then move by (x, y) pixels."""
    move = np.array((x, y, 0.0))
    return [Placed(p.ends * scale + move, p.a * scale, p.b * scale, p.shift * scale) for p in placed]


def rasterise(tubes: list[Tube], placed: list[Placed], view: View, shape: tuple[int, int], scale: float) -> Surface:
    """Draw into a fresh buffer of ``shape`` (H, W); ``scale`` is pixels per metre, for the width of the melt."""
    surface = Surface(
        np.full(shape, FAR, np.float32), np.zeros(shape, np.uint8), *(np.zeros(shape, np.float32) for _ in range(3))
    )
    for number, (tube, flat) in enumerate(zip(tubes, placed, strict=True)):
        _draw(surface, number, tube, flat, view, np.float32(0.03 * scale))
    return surface


def _draw(surface: Surface, number: int, tube: Tube, flat: Placed, view: View, melt: np.float32) -> None:
    (x0, y0, z0), (x1, y1, z1) = flat.ends.tolist()
    length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-3)
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    psi = view.yaw + tube.yaw
    sin, cos, tilt = np.sin(psi), np.cos(psi), np.sin(view.pitch)
    width = np.hypot(flat.a * cos, flat.b * sin)
    reach = float(width.max() + np.abs(flat.shift * sin).max() + tilt * flat.b.max()) + 1
    height, full = surface.depth.shape
    left, right = max(int(min(x0, x1) - reach), 0), min(int(max(x0, x1) + reach) + 2, full)
    high, low = max(int(min(y0, y1) - reach), 0), min(int(max(y0, y1) + reach) + 2, height)
    if left >= right or high >= low:
        return
    dx = np.arange(left, right, dtype=np.float32)[None] - np.float32(x0)
    dy = np.arange(high, low, dtype=np.float32)[:, None] - np.float32(y0)
    along = dx * np.float32(ux) + dy * np.float32(uy)
    across = dx * np.float32(uy) - dy * np.float32(ux)
    t = np.clip(along * np.float32(1 / length), 0, 1)

    knot = t * np.float32(KNOTS - 1)
    index = np.minimum(knot.astype(np.int32), KNOTS - 2)
    part = knot - index
    table = np.stack([width, (flat.b**2 - flat.a**2) * sin * cos / width**2, flat.a * flat.b / width, flat.shift])
    table = table.astype(np.float32)
    w, slant, bulge, shift = (row[index] + part * (row[index + 1] - row[index]) for row in table)

    across = across - shift * np.float32(sin)
    q2 = (across / w) ** 2
    if tube.round_top:
        q2 += (np.minimum(along, 0) / w) ** 2
    if tube.round_bottom:
        q2 += (np.maximum(along - np.float32(length), 0) / w) ** 2
    inside = q2 < 1
    local = across * slant + bulge * np.sqrt(np.maximum(1 - q2, 0))  # depth relative to the axis
    # seen from above, a ring round the tube is an arc: its near side lies lower in the image
    ring = (along - local * np.float32(tilt)) * np.float32(1 / length)
    if not tube.round_top:
        inside &= ring > 0
    if not tube.round_bottom:
        inside &= ring < 1
    z = np.float32(z0) + np.float32(z1 - z0) * t + local + shift * np.float32(cos)

    box = np.s_[high:low, left:right]
    old = surface.depth[box]
    front = inside & (z > old)
    overlap = np.maximum(melt - np.abs(z - old), 0)
    surface.depth[box] = np.where(inside, np.maximum(z, old) + overlap * overlap * (0.25 / melt), old)
    surface.part[box][front] = number
    surface.v[box][front] = (np.float32(tube.v[0]) + np.float32(tube.v[1] - tube.v[0]) * np.clip(ring, 0, 1))[front]
    ratio = np.float32(flat.a.max() / max(flat.b.max(), 1e-6))
    depth_half = w if abs(ratio - 1) < 1e-3 else np.sqrt(np.maximum(w * bulge, 1e-6) * (1 / ratio))
    lateral = depth_half * ratio
    surface.lx[box][front] = ((across * np.float32(cos) - local * np.float32(sin)) / lateral)[front]
    surface.lz[box][front] = ((across * np.float32(sin) + local * np.float32(cos)) / depth_half)[front]


@dataclass(frozen=True)
class Light:
    """``sun``: unit vector to the light (x right, y up, z to the camera); colours are linear RGB."""

    sun: tuple[float, float, float]
    sun_colour: tuple[float, float, float]
    sky_colour: tuple[float, float, float]
    ground_colour: tuple[float, float, float]


def shade(depth: np.ndarray, albedo: np.ndarray, light: Light, scale: float) -> np.ndarray:
    """Linear RGB (H, W, 3) float32 of a melted depth buffer; ``albedo`` linear, ``scale`` pixels per metre."""
    nx, ny = -_slope(depth, 1), _slope(depth, 0)  # image rows run down, y runs up
    inverse = 1 / np.sqrt(nx * nx + ny * ny + 1)
    nx, ny, nz = nx * inverse, ny * inverse, inverse
    sun = np.maximum(nx * light.sun[0] + ny * light.sun[1] + nz * light.sun[2], 0) * _shadow(depth, light.sun, scale)
    up = (0.5 + 0.5 * ny) * (1 - 0.75 * _crevice(depth, scale))
    down = 0.5 - 0.5 * ny
    out = np.empty_like(albedo)
    for c in range(3):
        out[..., c] = albedo[..., c] * (
            sun * light.sun_colour[c] + up * light.sky_colour[c] + down * light.ground_colour[c]
        )
    return out


def _slope(depth: np.ndarray, axis: int) -> np.ndarray:
    """Depth's derivative; of the two one-sided differences the flatter, so an edge between parts is no cliff."""
    step = np.diff(depth, axis=axis)
    first, last = np.take(step, [0], axis), np.take(step, [-1], axis)
    back, ahead = np.concatenate([first, step], axis), np.concatenate([step, last], axis)
    return np.clip(np.where(np.abs(back) < np.abs(ahead), back, ahead), -6, 6)


def _crevice(depth: np.ndarray, scale: float) -> np.ndarray:
    """0 open to 1 buried: how much of the neighbourhood stands nearer to the camera (ambient occlusion)."""
    radius = max(int(0.05 * scale), 2)
    floor = depth.max() - np.float32(0.6 * scale)
    clipped = np.maximum(depth, floor)
    occlusion = _box(_box(clipped, radius, 0), radius, 1) - clipped
    return np.clip(occlusion / np.float32(0.06 * scale), 0, 1)


def _box(x: np.ndarray, radius: int, axis: int) -> np.ndarray:
    x = np.moveaxis(x, axis, 0)
    padded = np.concatenate([np.repeat(x[:1], radius + 1, 0), x, np.repeat(x[-1:], radius, 0)])
    total = np.cumsum(padded, axis=0, dtype=np.float32)
    return np.moveaxis((total[2 * radius + 1 :] - total[: -2 * radius - 1]) / np.float32(2 * radius + 1), 0, axis)


def _shadow(depth: np.ndarray, sun: tuple[float, float, float], scale: float) -> np.ndarray:
    """1 lit to 0.25 in the shadow that parts of the body cast on others: three steps towards the sun."""
    blocked = np.zeros(depth.shape, np.float32)
    for reach in (0.04, 0.08, 0.14):
        dx, dy = round(reach * scale * sun[0]), -round(reach * scale * sun[1])
        nearer = _moved(depth, dy, dx) - depth - np.float32(reach * scale * max(sun[2], 0.0) + 0.02 * scale)
        np.maximum(blocked, np.clip(nearer / np.float32(0.03 * scale), 0, 1), out=blocked)
    return 1 - 0.75 * blocked


def _moved(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """``x[i + dy, j + dx]``, FAR outside."""
    out = np.full_like(x, FAR)
    h, w = x.shape
    rows, cols = slice(max(-dy, 0), min(h, h - dy)), slice(max(-dx, 0), min(w, w - dx))
    out[rows, cols] = x[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
    return out
