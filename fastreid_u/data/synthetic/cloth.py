# SPDX-License-Identifier: Apache-2.0
"""What the surface is made of: skin, hair and patterned cloth, from the place on the tube."""

from functools import cache

import numpy as np

from fastreid_u.data.synthetic.body import Body
from fastreid_u.data.synthetic.identity import Fabric, Person
from fastreid_u.data.synthetic.shading import Surface

_GROUPS = ("skin", "head", "hair", "top", "sleeve", "bottom", "shoes", "bag", "hat")


def paint(surface: Surface, body: Body, person: Person) -> tuple[np.ndarray, np.ndarray]:
    """Albedo (h, w, 3) in linear RGB and depth of the wrinkles (h, w) in 0..1, float32, of the surface's window."""
    group = np.array([_GROUPS.index(name) for name in body.fabric])[surface.part]
    colour, fold = np.zeros((group.size, 3), np.float32), np.zeros(group.size, np.float32)
    for number, name in enumerate(_GROUPS):
        where = np.flatnonzero(group == number)
        if where.size:
            v, lx, lz = surface.v[where], surface.lx[where], surface.lz[where]
            colour[where], fold[where] = _material(name, person, v, lx, lz)
    albedo, folds = np.zeros((*surface.seen.shape, 3), np.float32), np.zeros(surface.seen.shape, np.float32)
    albedo[surface.seen], folds[surface.seen] = colour * colour, fold  # display values to linear light, with gamma 2
    return albedo, folds


def wrinkles() -> np.ndarray:
    """(512, 512) float32 tile of soft folds, mean 0, deviation 1."""
    return noise_tile(0, 512, 1.0, 0.050, 0.055)


def _material(name: str, person: Person, v, lx, lz) -> tuple[np.ndarray, float]:
    if name == "skin":
        return np.array(person.skin, np.float32), 0.0
    if name == "hair":
        return _hair(person, v, lx), 0.25
    if name == "head":
        return _face(person, v, lx, lz), 0.0
    if name in ("top", "sleeve"):
        return _top(person, name, v, lx, lz), person.fabrics["top"].fold
    fabric = person.fabrics[name]
    out = weave(fabric, v, lx, lz, person.stature)
    if name == "shoes":
        out[v < 0.006] *= 0.6
    if name == "bag":  # flap and seam
        middle = 0.5 * (v.min() + v.max())
        out[np.abs(v - middle - 0.03) < 0.008] *= 0.6
    return out, fabric.fold


def weave(fabric: Fabric, v, lx, lz, stature: float) -> np.ndarray:
    """Colour (N, 3) of a patterned cloth at ``v`` metres of height and (lx, lz) on the section's unit circle."""
    mix = np.zeros(v.shape, np.float32)  # 0 first colour, 1 second
    period, kind = fabric.scale, fabric.pattern
    if kind == "hstripe":
        mix = (np.mod(v, period) < 0.45 * period).astype(np.float32)
    elif kind == "vstripe":
        turn = np.arctan2(lx, lz) * np.float32(0.14)
        mix = (np.mod(turn, 0.6 * period) < 0.2 * period).astype(np.float32)
    elif kind == "check":
        turn = np.arctan2(lx, lz) * np.float32(0.14)
        mix = 0.5 * (np.mod(v, period) < 0.5 * period) + 0.5 * (np.mod(turn, period) < 0.5 * period)
    elif kind == "dots":
        turn = np.arctan2(lx, lz) * np.float32(0.14)
        dy, dx = np.mod(v, 0.7 * period) / (0.7 * period) - 0.5, np.mod(turn, 0.7 * period) / (0.7 * period) - 0.5
        mix = (dx * dx + dy * dy < 0.09).astype(np.float32)
    elif kind == "block":
        mix = (v > stature * (0.58 + 1.2 * period)).astype(np.float32)
    elif kind == "fade":
        mix = np.clip((v / stature - 0.45) / 0.35, 0, 1)
    elif kind == "side":
        mix = (np.abs(lz) < 0.16).astype(np.float32)
    elif kind == "camo":
        tile = noise_tile(1 + fabric.key % 4, 256, 1.0, 0.05, 0.05)
        row = (v * (1000 * 0.08 / period)).astype(np.int32) % 256
        col = (np.arctan2(lx, lz) * (140 * 0.08 / period)).astype(np.int32) % 256
        mix = (tile[row, col] > 0.2).astype(np.float32)
    elif kind == "print":
        mix = _print(fabric, v / stature, lx, lz)
    first, second = np.array(fabric.colour, np.float32), np.array(fabric.second, np.float32)
    return first + np.asarray(mix, np.float32)[:, None] * (second - first)


def _print(fabric: Fabric, height, lx, lz) -> np.ndarray:
    """A coarse picture on the chest, or on the back: random cells, alike on both halves or not."""
    rng = np.random.default_rng(fabric.key)
    rows, cols = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    cells = rng.random((rows, cols)) < 0.7
    cells[0, 0] = True
    if rng.random() < 0.5:
        cells |= cells[:, ::-1]
    top, tall, wide = rng.uniform(0.74, 0.78), rng.uniform(0.04, 0.14), rng.uniform(0.35, 0.6)
    row = np.floor((top - height) / tall * rows).astype(np.int32)
    col = np.floor((lx / wide + 1) / 2 * cols).astype(np.int32)
    seen = (row >= 0) & (row < rows) & (col >= 0) & (col < cols) & ((lz > 0.2) if rng.random() < 0.75 else (lz < -0.2))
    return (seen & cells[np.clip(row, 0, rows - 1), np.clip(col, 0, cols - 1)]).astype(np.float32)


def _top(person: Person, name: str, v, lx, lz) -> np.ndarray:
    fabric, stature, cut = person.fabrics["top"], person.stature, person.top_cut
    if fabric.pattern == "raglan":
        out = np.tile(np.array(fabric.second if name == "sleeve" else fabric.colour, np.float32), (v.size, 1))
    elif name == "sleeve" and fabric.pattern in ("print", "block", "fade"):
        out = np.tile(np.array(fabric.colour if fabric.pattern == "print" else fabric.second, np.float32), (v.size, 1))
    else:
        out = weave(fabric, v, lx, lz, stature)
    if name == "sleeve":
        return out
    height = v / stature
    if cut in ("jacket", "coat"):  # worn open: what is under shows in front
        gap = 0.10 + 0.6 * np.clip(height - 0.72, 0, 1) if fabric.key % 3 else np.full_like(height, 0.03)
        inner = (lz > 0) & (np.abs(lx) < gap)
        out[inner] = person.fabrics["under"].colour
    elif cut == "shirt":
        out[(lz > 0) & (np.abs(lx) < 0.04)] *= 0.75
    if cut in ("vest", "tee", "dress", "long"):  # neckline
        out[(height > 0.833) & (lz > -0.2)] = person.skin
    if cut == "vest":
        out[(height > 0.795) & (np.abs(lx) < 0.42) & (lz > 0)] = person.skin
    if cut == "dress":
        out[np.abs(height - 0.615) < 0.008] *= 0.6
    _straps(out, person, height, lx, lz)
    return out


def _straps(out: np.ndarray, person: Person, height, lx, lz) -> None:
    if person.bag == "backpack":
        strap = (np.abs(np.abs(lx) - 0.52) < 0.10) & (lz > -0.3) & (height > 0.64)
    elif person.bag == "cross":  # from one shoulder to the other hip, before and behind
        strap = np.abs(-lx * person.bag_side * 0.13 + 0.70 - height) < 0.014
    elif person.bag == "shoulder":
        strap = (np.abs(lx - person.bag_side * 0.78) < 0.08) & (height > 0.55)
    else:
        return
    out[strap] = person.fabrics["bag"].colour


def _hair(person: Person, v, lx) -> np.ndarray:
    strands = 1 + 0.18 * np.sin(lx * 23 + person.fabrics["top"].key % 7) * np.cos(lx * 9)
    return np.array(person.hair, np.float32) * strands.astype(np.float32)[:, None]


def _face(person: Person, v, lx, lz) -> np.ndarray:
    """Hairline, brows, eyes, mouth and beard; ``v`` is 0 at the chin and 1 at the crown."""
    v = v / person.stature
    out = np.tile(np.array(person.skin, np.float32), (v.size, 1))
    hair = np.array(person.hair, np.float32)
    front = lz > 0.45
    out[front & (np.abs(v - 0.52) < 0.045) & (np.abs(np.abs(lx) - 0.40) < 0.20)] *= 0.5  # eyes
    out[front & (np.abs(v - 0.61) < 0.025) & (np.abs(np.abs(lx) - 0.40) < 0.24)] *= 0.65  # brows
    out[front & (np.abs(v - 0.22) < 0.025) & (np.abs(lx) < 0.28)] *= (0.8, 0.6, 0.6)  # mouth
    out[(np.abs(v - 0.42) < 0.1) & (lz > 0.8) & (np.abs(lx) < 0.12)] *= 1.08  # nose
    if person.beard:
        out[(v < 0.30) & (lz > -0.1) & ~((v > 0.2) & (v < 0.25) & (np.abs(lx) < 0.25))] = 0.6 * hair + 0.4 * out[0]
    if person.hair_style == "bald":
        return out
    # the line runs from high on the forehead down behind the ears
    line = np.where(lz > 0.35, 0.70 - 0.04 * np.abs(lx), np.where(lz > -0.05, 0.50, 0.16))
    if person.hat == "cap":
        line = np.where(lz > 0.2, 2.0, line)
    out[v > line] = hair
    if person.hat == "cap":
        out[v > 0.66 - 0.05 * lz] = person.fabrics["hat"].colour
    return out


@cache
def noise_tile(seed: int, size: int, power: float, low_x: float, low_y: float) -> np.ndarray:
    """Periodic Gaussian noise, smooth below the wavelengths 1/low (cycles per pixel), zero mean, unit deviation."""
    rng = np.random.default_rng(seed)
    fx, fy = np.fft.rfftfreq(size)[None], np.fft.fftfreq(size)[:, None]
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
    spectrum *= np.exp(-((fx / low_x) ** 2 + (fy / low_y) ** 2)) * np.hypot(fx, fy) ** (power / 2)
    tile = np.fft.irfft2(spectrum, (size, size))
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)
