# SPDX-License-Identifier: Apache-2.0
"""Who a person is: build, skin, hair, clothes and what they carry. Never changes between images."""

from dataclasses import dataclass, field

import numpy as np

Colour = tuple[float, float, float]

# sRGB, commonest in the street first; the second column weighs tops, the third trousers and skirts.
CLOTH: tuple[tuple[Colour, float, float], ...] = (
    ((0.07, 0.07, 0.08), 12, 12),  # black
    ((0.13, 0.17, 0.31), 8, 9),  # navy
    ((0.52, 0.53, 0.54), 9, 8),  # grey
    ((0.82, 0.82, 0.80), 10, 5),  # white
    ((0.23, 0.31, 0.44), 5, 12),  # denim
    ((0.62, 0.55, 0.43), 6, 8),  # beige
    ((0.60, 0.14, 0.14), 7, 3),  # red
    ((0.34, 0.24, 0.16), 5, 6),  # brown
    ((0.32, 0.34, 0.20), 5, 5),  # olive
    ((0.46, 0.58, 0.71), 6, 4),  # light blue
    ((0.38, 0.10, 0.16), 4, 3),  # burgundy
    ((0.74, 0.50, 0.56), 4, 1.5),  # pink
    ((0.19, 0.31, 0.56), 5, 2),  # royal blue
    ((0.15, 0.36, 0.25), 4, 1.5),  # green
    ((0.76, 0.62, 0.23), 4, 1.5),  # yellow
    ((0.34, 0.25, 0.43), 4, 1.5),  # purple
)
# of shoes, bags and hats; not subject to the palette, which is about clothes
GEAR: tuple[tuple[Colour, float], ...] = (
    ((0.07, 0.07, 0.08), 9),
    ((0.80, 0.80, 0.79), 5),
    ((0.36, 0.36, 0.37), 4),
    ((0.33, 0.23, 0.16), 3),
    ((0.13, 0.17, 0.29), 3),
    ((0.58, 0.47, 0.34), 2),
    ((0.55, 0.15, 0.15), 1.2),
    ((0.20, 0.33, 0.50), 1),
    ((0.26, 0.32, 0.22), 1),
    ((0.60, 0.40, 0.46), 0.6),
)
SKIN: tuple[Colour, ...] = (
    (0.90, 0.72, 0.61),
    (0.84, 0.64, 0.52),
    (0.76, 0.56, 0.42),
    (0.62, 0.43, 0.31),
    (0.46, 0.31, 0.22),
    (0.33, 0.21, 0.15),
)
HAIR: tuple[tuple[Colour, float], ...] = (
    ((0.07, 0.06, 0.06), 5),
    ((0.16, 0.11, 0.08), 4),
    ((0.30, 0.20, 0.12), 3),
    ((0.58, 0.43, 0.24), 2),
    ((0.48, 0.22, 0.11), 1),
    ((0.60, 0.59, 0.58), 1),
)
PATTERNS = ("hstripe", "vstripe", "check", "print", "block", "fade", "dots", "camo", "raglan")


@dataclass(frozen=True)
class Fabric:
    """One material: sRGB colours and the pattern that mixes them; ``scale`` is the pattern's period in metres."""

    colour: Colour
    second: Colour = (0.8, 0.8, 0.8)
    pattern: str = "plain"
    scale: float = 0.08
    fold: float = 1.0  # depth of the wrinkles, 0 for skin and leather
    key: int = 0  # seed of a printed picture


@dataclass(frozen=True)
class Person:
    """Lengths in metres, ratios relative to the average build."""

    stature: float
    shoulders: float
    girth: float
    belly: float
    hips: float
    legs: float
    head: float
    skin: Colour
    hair: Colour
    hair_style: str  # bald, short, crop, bob, long, tail, bun
    beard: bool
    top_cut: str  # vest, tee, long, shirt, hoodie, jacket, coat, dress
    bottom_cut: str  # slim, straight, wide, shorts, skirt, long_skirt
    top_length: float  # hem of the top, as a share of the stature
    bottom_length: float  # hem of shorts or skirt, as a share of the stature
    bag: str  # none, backpack, shoulder, cross, hand
    bag_side: int
    hat: str  # none, cap, beanie
    posture: float  # forward lean in radians
    stride: float
    fabrics: dict[str, Fabric] = field(default_factory=dict)


def make_person(rng: np.random.Generator, palette: int = 16, texture: float = 0.5) -> Person:
    """Draw a person whose clothes use the first ``palette`` colours and are patterned with probability ``texture``."""
    female = rng.random() < 0.5
    cut = _choice(rng, ("vest", "tee", "long", "shirt", "hoodie", "jacket", "coat", "dress"),
                  (1 * female, 6, 4, 3, 3, 4, 2, 2 * female))  # fmt: skip
    warm = cut in ("vest", "tee", "shirt", "hoodie")
    bottom = _choice(rng, ("slim", "straight", "wide", "shorts", "skirt", "long_skirt"),
                     (4, 5, 1.5, 3 if warm else 0.5, 2.5 * female, 1 * female))  # fmt: skip
    style = _choice(rng, ("bald", "short", "crop", "bob", "long", "tail", "bun"),
                    (0, 1, 0, 2, 3.5, 2.5, 1) if female else (0.8, 4, 3, 0.4, 0.2, 0.2, 0))  # fmt: skip
    bag = _choice(rng, ("none", "backpack", "shoulder", "cross", "hand"), (4, 3.5, 1.5, 1.2, 1.2))
    hat = _choice(rng, ("none", "cap", "beanie"), (8, 1.2, 0.8))
    skin, hair = SKIN[rng.integers(len(SKIN))], _choice(rng, [c for c, _ in HAIR], [w for _, w in HAIR])
    top = _garment(rng, 1, palette, texture)
    under = _garment(rng, 1, palette, 0.0)
    return Person(
        stature=float(rng.normal(1.64 if female else 1.76, 0.07)),
        shoulders=float(rng.normal(0.95 if female else 1.05, 0.05)),
        girth=float(np.clip(rng.normal(1.0, 0.13), 0.8, 1.4)),
        belly=float(rng.gamma(1.5, 0.15)),
        hips=float(rng.normal(1.07 if female else 0.98, 0.06)),
        legs=float(rng.normal(1.0, 0.03)),
        head=float(rng.normal(1.06, 0.04)),
        skin=_vary(rng, skin, 0.03),
        hair=_vary(rng, hair, 0.03),
        hair_style=style,
        beard=not female and rng.random() < 0.2,
        top_cut=cut,
        bottom_cut=bottom,
        top_length={"coat": rng.uniform(0.30, 0.42), "dress": rng.uniform(0.27, 0.42)}.get(
            cut, rng.uniform(0.46, 0.53)
        ),
        bottom_length={"shorts": rng.uniform(0.28, 0.40), "long_skirt": rng.uniform(0.08, 0.20)}.get(
            bottom, rng.uniform(0.27, 0.38)
        ),
        bag=bag,
        bag_side=int(rng.choice((-1, 1))),
        hat=hat,
        posture=float(rng.normal(0.03, 0.03)),
        stride=float(rng.uniform(0.75, 1.15)),
        fabrics={
            "top": top,
            "under": under,
            "bottom": _garment(rng, 2, palette, 0.35 * texture, ("side", "check", "fade", "camo", "vstripe")),
            "shoes": _gear(rng, 0.0),
            "bag": _gear(rng, 0.25),
            "hat": _gear(rng, 0.3),
        },
    )


def _choice(rng: np.random.Generator, items, weights):
    weights = np.asarray(weights, dtype=float)
    return items[int(rng.choice(len(items), p=weights / weights.sum()))]


def _vary(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    # mostly lightness, a little hue: two navy coats differ as two navy coats do
    shifted = np.asarray(colour) * np.exp(rng.normal(0, 3 * amount) + rng.normal(0, 1.5 * amount, 3))
    return tuple(float(c) for c in np.clip(shifted, 0.03, 0.95))


def _gear(rng: np.random.Generator, fold: float) -> Fabric:
    colour = _choice(rng, [c for c, _ in GEAR], [w for _, w in GEAR])
    return Fabric(_vary(rng, colour, 0.04), fold=fold, key=int(rng.integers(1 << 30)))


def _garment(rng: np.random.Generator, column: int, palette: int, texture: float,
             patterns: tuple[str, ...] = PATTERNS, fold: float = 1.0) -> Fabric:  # fmt: skip
    colours = CLOTH[:palette]
    weights = np.array([row[column] for row in colours], dtype=float)
    weights /= weights.sum()
    first = int(rng.choice(len(colours), p=weights))
    base = colours[first][0]
    # the second colour must be seen against the first
    contrast = np.array([weights[j] * np.abs(np.subtract(base, c[0])).max() ** 2 for j, c in enumerate(colours)])
    if not contrast.any():  # a palette of one colour: a lighter shade of it
        contrast[:] = 1
    second = _choice(rng, [c[0] for c in colours], contrast)
    if second == base:
        second = tuple(0.55 * c + 0.25 for c in base)
    luck, pattern = rng.random(), patterns[int(rng.integers(len(patterns)))]
    return Fabric(
        colour=_vary(rng, base, 0.035),
        second=_vary(rng, second, 0.035),
        pattern=pattern if luck < texture else "plain",
        scale=float(rng.uniform(0.05, 0.14)),
        fold=fold,
        key=int(rng.integers(1 << 30)),
    )
