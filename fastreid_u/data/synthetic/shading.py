# SPDX-License-Identifier: Apache-2.0
"""Tubes to pixels: a depth buffer in which touching tubes melt into one another, then normals, light and shadow.

Melting the depths (a smooth maximum) instead of sorting parts is what makes shoulders, hips and knees look grown
rather than screwed on: the normal is taken from the melted depth, so no part shows its own outline.
"""

from dataclasses import dataclass

import numpy as np

from fastreid_u.data.synthetic.body import KNOTS, Body

FAR = np.float32(-1e4)
_FINE = 64  # radii along a tube are looked up in a table of this many places


@dataclass(frozen=True)
class View:
    """Where the camera stands, metres and radians: at ``yaw`` 0 it sees the face, ``pitch`` looks down."""

    yaw: float
    pitch: float
    distance: float


@dataclass
class Drawing:
    """N tubes on the image plane; lengths in metres until ``placed`` makes them pixels."""

    ends: np.ndarray  # (N, 2, 3): x right, y down, z towards the camera
    table: np.ndarray  # (N, 4, _FINE): half width, slant, bulge and shift of the section, see ``_draw``
    ratio: np.ndarray  # (N,) lateral over forward half width
    turn: np.ndarray  # (N, 2) sine and cosine of each section's yaw

    def extent(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        reach = 0.8 * self.table[:, 0].max(1)
        low, high = self.ends[:, :, :2].min(1) - reach[:, None], self.ends[:, :, :2].max(1) + reach[:, None]
        return (*low.min(0).tolist(), *high.max(0).tolist())

    def placed(self, scale: float, x: float, y: float) -> "Drawing":
        """In pixels, ``scale`` to the metre, moved by (x, y)."""
        unit = np.array((scale, 1, scale, scale))[:, None]  # the slant is a ratio
        return Drawing(self.ends * scale + (x, y, 0), self.table * unit, self.ratio, self.turn)


@dataclass
class Surface:
    """The pixels of a window that show the body, M of them, row by row."""

    window: tuple[slice, slice]
    depth: np.ndarray  # (h, w) of the window, pixels, FAR where nothing is
    seen: np.ndarray  # (h, w) bool, M set
    part: np.ndarray  # (M,) tube
    v: np.ndarray  # (M,) metres along the tube
    lx: np.ndarray  # (M,) place on the section's unit circle: -1 right of the person, 1 left
    lz: np.ndarray  # (M,) -1 back, 1 front


def project(body: Body, view: View, stature: float) -> Drawing:
    """Perspective of a camera that looks at the middle of the body."""
    sy, cy, sp, cp = np.sin(view.yaw), np.cos(view.yaw), np.sin(view.pitch), np.cos(view.pitch)
    x, y, z = body.ends[..., 0], body.ends[..., 1] - stature / 2, body.ends[..., 2]
    x, z = x * cy + z * sy, z * cy - x * sy
    near = y * sp + z * cp
    zoom = view.distance / (view.distance - near)
    ends = np.stack([x * zoom, (z * sp - y * cp) * zoom, near], axis=2)

    place = np.linspace(0, KNOTS - 1, _FINE)
    knot = np.minimum(place.astype(int), KNOTS - 2)
    profile = body.profile[..., knot] + (place - knot) * (body.profile[..., knot + 1] - body.profile[..., knot])
    profile *= (zoom[:, :1] + np.linspace(0, 1, _FINE) * (zoom[:, 1:] - zoom[:, :1]))[:, None]
    a, b, shift = profile[:, 0], profile[:, 1], profile[:, 2]
    turn = view.yaw + body.yaw
    sin, cos = np.sin(turn)[:, None], np.cos(turn)[:, None]
    width = np.sqrt((a * cos) ** 2 + (b * sin) ** 2)
    table = np.stack([width, (b * b - a * a) * sin * cos / width**2, a * b / width, shift], axis=1)
    return Drawing(ends, table, a.max(1) / b.max(1), np.concatenate([sin, cos], axis=1))


def rasterise(body: Body, drawing: Drawing, view: View, shape: tuple[int, int], scale: float) -> Surface | None:
    """Draw on a canvas of ``shape`` (H, W), ``scale`` pixels to the metre; None if (next to) nothing falls on it."""
    depth, part = np.full(shape, FAR, np.float32), np.zeros(shape, np.uint8)
    ends, table = drawing.ends.astype(np.float32), drawing.table.astype(np.float32)
    tilt = np.float32(np.sin(view.pitch))
    for number in range(len(ends)):
        _draw(
            depth, part, number, body, ends[number], table[number], drawing.turn[number], tilt, np.float32(0.03 * scale)
        )
    rows, cols = np.flatnonzero((depth > FAR / 2).any(1)), np.flatnonzero((depth > FAR / 2).any(0))
    if rows.size < 3 or cols.size < 3:  # no slope can be taken
        return None
    window = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    seen = depth[window] > FAR / 2
    y, x = np.nonzero(seen)
    which = part[window][seen]
    return Surface(window, depth[window], seen, which, *_place(body, drawing, which, x + cols[0], y + rows[0], tilt))


def _draw(depth, part, number: int, body: Body, ends, table, turn, tilt, melt) -> None:
    """Add one tube to the buffers.

    An elliptic section (a, b) turned by psi shows the half width w = sqrt(a² cos² psi + b² sin² psi); at x across, its
    near side lies at depth slant * x + bulge * sqrt(1 - (x/w)²), slant = (b² - a²) sin psi cos psi / w², bulge = ab/w.
    """
    (x0, y0, z0), (x1, y1, z1) = ends.tolist()
    length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-3)
    ux, uy = np.float32((x1 - x0) / length), np.float32((y1 - y0) / length)
    sin, cos = np.float32(turn[0]), np.float32(turn[1])
    reach = (
        float(table[0].max())
        + abs(float(sin)) * float(np.abs(table[3]).max())
        + float(tilt) * float(table[2].max())
        + 1
    )
    height, width = depth.shape
    left, right = max(int(min(x0, x1) - reach), 0), min(int(max(x0, x1) + reach) + 2, width)
    high, low = max(int(min(y0, y1) - reach), 0), min(int(max(y0, y1) + reach) + 2, height)
    if left >= right or high >= low:
        return
    dx = np.arange(left - x0, right - x0 - 0.5, dtype=np.float32)
    dy = np.arange(high - y0, low - y0 - 0.5, dtype=np.float32)[:, None]
    along = (dx * ux + dy * uy) * np.float32(1 / length)
    t = np.clip(along, 0, 1)
    w, slant, bulge, shift = table[:, (t * np.float32(_FINE - 1)).astype(np.intp)]
    across = dx * uy - dy * ux - shift * sin

    q2 = np.square(across / w)
    round_top, round_bottom = body.round[number]
    if round_top or round_bottom:
        beyond = along - t
        if not round_bottom:
            beyond = np.minimum(beyond, 0)
        elif not round_top:
            beyond = np.maximum(beyond, 0)
        q2 += np.square(beyond * np.float32(length) / w)
    inside = q2 < 1
    local = across * slant + bulge * np.sqrt(np.maximum(1 - q2, 0))  # depth relative to the axis
    if not (round_top and round_bottom):
        # seen from above, a ring round the tube is an arc: its near side lies lower in the image
        ring = along - local * (tilt / np.float32(length))
        if not round_top:
            inside &= ring > 0
        if not round_bottom:
            inside &= ring < 1
    z = np.float32(z0) + np.float32(z1 - z0) * t + local + shift * cos

    box = np.s_[high:low, left:right]
    old = depth[box]
    overlap = np.maximum(melt - np.abs(z - old), 0)
    part[box][inside if body.over[number] else inside & (z > old)] = number
    depth[box] = np.where(inside, np.maximum(z, old) + overlap * overlap * (np.float32(0.25) / melt), old)


def _place(body: Body, drawing: Drawing, which, x, y, tilt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texture coordinates v, lx, lz of visible pixels: the formulas of ``_draw``, once for all tubes."""
    start, step = drawing.ends[:, 0, :2], drawing.ends[:, 1, :2] - drawing.ends[:, 0, :2]
    length = np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-3)
    constants = np.column_stack([start, step / length[:, None], length, drawing.turn, drawing.ratio, body.v])
    x0, y0, ux, uy, length, sin, cos, ratio, v0, v1 = constants.astype(np.float32)[which].T
    dx, dy = x.astype(np.float32) - x0, y.astype(np.float32) - y0
    along = (dx * ux + dy * uy) / length
    row = (np.clip(along, 0, 1) * np.float32(_FINE - 1)).astype(np.intp)
    w, slant, bulge, shift = drawing.table.astype(np.float32).transpose(1, 0, 2)[:, which, row]
    across = dx * uy - dy * ux - shift * sin
    local = across * slant + bulge * np.sqrt(np.maximum(1 - np.square(across / w), 0))
    v = v0 + (v1 - v0) * np.clip(along - local * tilt / length, 0, 1)
    forward = np.sqrt(np.maximum(w * bulge / ratio, 1e-6))  # b, from w * bulge = ab
    return v, (across * cos - local * sin) / (forward * ratio), (across * sin + local * cos) / forward


@dataclass(frozen=True)
class Light:
    """``sun``: unit vector to the light (x right, y up, z to the camera); colours are linear RGB."""

    sun: tuple[float, float, float]
    sun_colour: tuple[float, float, float]
    sky_colour: tuple[float, float, float]
    ground_colour: tuple[float, float, float]


def shade(depth: np.ndarray, albedo: np.ndarray, light: Light, scale: float) -> np.ndarray:
    """Linear RGB (H, W, 3) float32 of a melted depth buffer; ``albedo`` linear, ``scale`` pixels to the metre."""
    nx, ny = -_slope(depth, 1), _slope(depth, 0)  # image rows run down, y runs up
    nz = 1 / np.sqrt(nx * nx + ny * ny + 1)
    nx, ny = nx * nz, ny * nz
    sx, sy, sz = (np.float32(c) for c in light.sun)
    sun = np.maximum(nx * sx + ny * sy + nz * sz, 0) * _shadow(depth, light.sun, scale)
    up = (0.5 + 0.5 * ny) * (1 - np.float32(0.75) * _crevice(depth, scale))
    down = 0.5 - 0.5 * ny
    out = np.empty_like(albedo)
    for c in range(3):
        lit = sun * np.float32(light.sun_colour[c])
        lit += up * np.float32(light.sky_colour[c])
        lit += down * np.float32(light.ground_colour[c])
        out[..., c] = albedo[..., c] * lit
    return out


def _slope(depth: np.ndarray, axis: int) -> np.ndarray:
    """Depth's derivative; of the two one-sided differences the flatter, so an edge between parts is no cliff."""
    step = np.diff(depth, axis=axis)
    edge = np.s_[:1] if axis == 0 else np.s_[:, :1]
    back = np.concatenate([step[edge], step], axis)
    edge = np.s_[-1:] if axis == 0 else np.s_[:, -1:]
    ahead = np.concatenate([step, step[edge]], axis)
    return np.clip(np.where(np.abs(back) < np.abs(ahead), back, ahead), -6, 6)


def _crevice(depth: np.ndarray, scale: float) -> np.ndarray:
    """0 open to 1 buried: how much of the neighbourhood stands nearer to the camera (ambient occlusion)."""
    radius = max(int(0.05 * scale), 2)
    clipped = np.maximum(depth, depth.max() - np.float32(0.6 * scale))
    occlusion = _box(_box(clipped, radius, 0), radius, 1) - clipped
    return np.clip(occlusion / np.float32(0.06 * scale), 0, 1)


def _box(x: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """Mean over 2 radius + 1 pixels along an axis, edges repeated."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (radius + 1, radius)
    total = np.cumsum(np.pad(x, pad, mode="edge"), axis=axis, dtype=np.float32)
    size = 2 * radius + 1
    ahead, behind = (total[size:], total[:-size]) if axis == 0 else (total[:, size:], total[:, :-size])
    return (ahead - behind) / np.float32(size)


def _shadow(depth: np.ndarray, sun: tuple[float, float, float], scale: float) -> np.ndarray:
    """1 lit to 0.25 in the shadow that parts of the body cast on others: three steps towards the sun."""
    blocked = np.zeros(depth.shape, np.float32)
    for reach in (0.04, 0.08, 0.14):
        dx, dy = round(reach * scale * sun[0]), -round(reach * scale * sun[1])
        nearer = _moved(depth, dy, dx) - depth - np.float32(reach * scale * max(sun[2], 0.0) + 0.02 * scale)
        np.maximum(blocked, np.clip(nearer * np.float32(1 / (0.03 * scale)), 0, 1), out=blocked)
    return 1 - np.float32(0.75) * blocked


def _moved(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """``x[i + dy, j + dx]``, FAR outside."""
    out = np.full_like(x, FAR)
    h, w = x.shape
    dy, dx = max(-h, min(h, dy)), max(-w, min(w, dx))
    rows, cols = slice(max(-dy, 0), min(h, h - dy)), slice(max(-dx, 0), min(w, w - dx))
    out[rows, cols] = x[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
    return out
