# SPDX-License-Identifier: Apache-2.0
"""A person in a gait phase as about forty tubes: generalised cylinders with elliptic sections.

Body frame, metres: x to the person's left, y up from the ground, z forward. Lengths in the tables below are shares of
the stature; they follow the usual proportions of adults (head one 7.5th, hip joint at 0.52, shoulder at 0.81).
"""

from dataclasses import dataclass

import numpy as np

from fastreid_u.data.synthetic.identity import Person

KNOTS = 16  # samples of a tube's radii along its axis
_GRID = np.linspace(0, 1, KNOTS)
_EVEN = {n: np.linspace(0, 1, n) for n in range(1, KNOTS + 1)}


@dataclass(frozen=True)
class Pose:
    """What changes from image to image, radians: ``phase`` of the gait, its ``swing``, the head's turn, the arms."""

    phase: float
    swing: float = 0.45
    head_yaw: float = 0.0
    raised: int = 0  # an arm that holds a phone or a strap: -1 right, 1 left, 0 none


@dataclass
class Tube:
    """One tube, in shares of the stature. The profile holds half widths (lateral, forward) and a forward shift."""

    fabric: str
    ends: tuple  # top and bottom, (x, y, z) each
    profile: np.ndarray  # (3, KNOTS), top to bottom
    v: tuple[float, float]  # texture coordinate along the axis at both ends
    round: tuple[bool, bool]  # ends closed by a dome; else cut flat
    yaw: float = 0.0  # turn of the section about the axis, relative to the body
    over: bool = False  # cloth that hides, and is bulged by, whatever was drawn before


@dataclass
class Body:
    """N tubes as arrays, metres; drawn in this order."""

    fabric: list[str]
    ends: np.ndarray  # (N, 2, 3)
    profile: np.ndarray  # (N, 3, KNOTS)
    v: np.ndarray  # (N, 2)
    round: np.ndarray  # (N, 2) bool
    yaw: np.ndarray  # (N,)
    over: np.ndarray  # (N,) bool


# height, lateral half width, forward half width, forward shift
_TORSO = np.array(
    [
        (0.860, 0.033, 0.034, -0.008),
        (0.845, 0.046, 0.039, -0.008),
        (0.830, 0.074, 0.045, -0.006),
        (0.810, 0.101, 0.052, -0.004),
        (0.780, 0.110, 0.060, -0.002),
        (0.720, 0.104, 0.067, 0.002),
        (0.660, 0.092, 0.062, 0.002),
        (0.610, 0.084, 0.056, 0.002),
        (0.570, 0.089, 0.059, 0.000),
        (0.530, 0.097, 0.066, -0.004),
        (0.490, 0.094, 0.066, -0.006),
        (0.440, 0.088, 0.062, -0.004),
    ]
)[::-1]


def make_body(person: Person, pose: Pose) -> Body:
    """The person's tubes with the lower sole on y = 0 and the pelvis above x = z = 0."""
    legs, lift = _legs(person, pose)
    tubes = legs + _trunk(person, pose) + _arms(person, pose) + _head(person, pose) + _bag(person)
    ends = np.array([tube.ends for tube in tubes])
    ends[..., 2] += (person.posture + 0.03) * np.maximum(ends[..., 1] - 0.52, 0)  # lean from the hips
    ends[..., 1] += lift
    return Body(
        fabric=[tube.fabric for tube in tubes],
        ends=ends * person.stature,
        profile=np.array([tube.profile for tube in tubes]) * person.stature,
        v=np.array([tube.v for tube in tubes]) * person.stature,
        round=np.array([tube.round for tube in tubes]),
        yaw=np.array([tube.yaw for tube in tubes]),
        over=np.array([tube.over for tube in tubes]),
    )


def _tube(
    fabric, top, bottom, a, b=None, shift=0.0, v=None, round_top=True, round_bottom=True, yaw=0.0, over=False
) -> Tube:
    """``a``, ``b``, ``shift``: a number or values equally spaced from top to bottom."""
    profile = np.empty((3, KNOTS))
    for row, value in zip(profile, (a, a if b is None else b, shift), strict=True):
        row[:] = np.interp(_GRID, _EVEN[len(value)], value) if np.ndim(value) else value
    return Tube(fabric, (top, bottom), profile, v or (top[1], bottom[1]), (round_top, round_bottom), yaw, over)


def _trunk(person: Person, pose: Pose) -> list[Tube]:
    cut, loose = (
        person.top_cut,
        {"hoodie": 0.011, "jacket": 0.011, "coat": 0.014, "shirt": 0.006}.get(person.top_cut, 0.004),
    )
    hem = person.top_length
    heights = 0.850 + (hem - 0.850) * _GRID
    a, b, shift = _section(person, heights, loose)
    if cut in ("coat", "dress"):  # hangs free below the hips, and lets the legs swing
        below = np.clip((0.53 - heights) / 0.25, 0, 1)
        stride = 0.10 * pose.swing * np.abs(np.cos(pose.phase))
        a, b = np.maximum(a, 0.098) + 0.022 * below, np.maximum(b, 0.066) + (0.02 + stride) * below
    tubes = [] if cut == "dress" else _pelvis(person, pose)
    tubes.append(_tube("top", (0, 0.850, 0), (0, hem, 0), a, b, shift, round_top=False, round_bottom=False, over=True))
    tubes.append(_tube("skin", (0, 0.89, 0.004), (0, 0.81, -0.006), 0.033 * person.girth**0.5))
    if cut == "hoodie":
        tubes.append(_tube("top", (0, 0.865, -0.055), (0, 0.800, -0.070), (0.045, 0.060, 0.030), (0.022, 0.030, 0.012)))
    if cut in ("shirt", "jacket", "coat"):  # collar
        tubes.append(
            _tube("top", (0, 0.872, -0.006), (0, 0.838, -0.004), (0.040, 0.046), (0.038, 0.044), round_top=False)
        )
    return tubes


def _section(person: Person, heights: np.ndarray, loose: float):
    """Half widths and shift of the clothed trunk at the given heights."""
    a, b, shift = (np.interp(heights, _TORSO[:, 0], _TORSO[:, i]) for i in (1, 2, 3))
    upper = np.clip((heights - 0.62) / 0.15, 0, 1)
    wide = person.shoulders * upper + person.hips * person.girth**0.6 * (1 - upper)
    belly = person.belly * np.exp(-(((heights - 0.60) / 0.06) ** 2))
    return a * wide + loose, b * person.girth * (1 + 0.5 * belly) + loose, shift + 0.03 * belly


def _pelvis(person: Person, pose: Pose) -> list[Tube]:
    if "skirt" in person.bottom_cut:
        heights = 0.63 + (person.bottom_length - 0.63) * _GRID
        a, b, shift = _section(person, heights, 0.002)
        below = np.clip((0.55 - heights) / 0.3, 0, 1)
        stride = 0.22 * pose.swing * np.abs(np.cos(pose.phase))
        flare = 0.030 if person.bottom_cut == "skirt" else 0.022
        a, b = np.maximum(a, 0.09 * person.hips) + flare * below, np.maximum(b, 0.064) + (flare + stride) * below
        return [_tube("bottom", (0, 0.63, 0), (0, person.bottom_length, 0), a, b, shift, round_bottom=False, over=True)]
    heights = 0.63 + (0.475 * person.legs - 0.63) * _GRID
    a, b, shift = _section(person, heights, 0.001)
    return [_tube("bottom", (0, heights[0], 0), (0, heights[-1], 0), a, b, shift)]


def _legs(person: Person, pose: Pose) -> tuple[list[Tube], float]:
    """Legs and the lift that puts the lower sole on the ground."""
    scale, thick = person.legs, person.girth**0.7
    tubes, soles = [], []
    for side in (-1, 1):
        phase = pose.phase + (np.pi if side < 0 else 0)
        thigh = pose.swing * np.cos(phase) + 0.05
        flex = 0.10 + 1.5 * pose.swing * np.clip(-np.sin(phase - 0.2), 0, 1) ** 1.3  # the swinging leg bends
        hip = np.array((side * 0.050 * person.hips, 0.515 * scale, 0.0))
        knee = hip + 0.240 * scale * np.array((0.0, -np.cos(thigh), np.sin(thigh)))
        shin = thigh - flex
        ankle = knee + 0.235 * scale * np.array((-side * 0.03, -np.cos(shin), np.sin(shin)))
        toe_up = np.clip(0.35 * np.cos(phase), -0.4, 0.3) * pose.swing / 0.45 - 0.5 * np.clip(flex - 0.4, 0, 0.8)
        heel = ankle + np.array((0, -0.022, -0.018))
        toe = heel + 0.112 * np.array((side * 0.12, np.sin(toe_up), np.cos(toe_up)))
        soles.append(min(heel[1], toe[1]) - 0.018)
        tubes.append(_tube("shoes", ankle + np.array((0, 0.012, -0.004)), heel, 0.024, 0.026))
        tubes.append(_tube("shoes", heel, toe, (0.023, 0.027, 0.021), (0.022, 0.020, 0.016), v=(0.0, 0.11)))
        tubes += _leg_cover(person, hip, knee, ankle, thick)
    return tubes, -min(soles)


def _leg_cover(person: Person, hip, knee, ankle, thick: float) -> list[Tube]:
    thigh, calf = (0.053 * thick, 0.046 * thick, 0.036 * thick), (0.036 * thick, 0.037 * thick, 0.028 * thick, 0.023)
    bare = person.bottom_cut in ("shorts", "skirt", "long_skirt") or person.top_cut == "dress"
    v = (hip[1], hip[1] - 0.24, hip[1] - 0.475)
    if bare:
        tubes = [_tube("skin", hip, knee, thigh, v=v[:2]), _tube("skin", knee, ankle, calf, v=v[1:])]
        if person.bottom_cut == "shorts" and person.top_cut != "dress":
            share = np.clip((hip[1] - person.bottom_length) / (hip[1] - 0.285), 0.3, 1.0)
            end = hip + share * (knee - hip)
            width = (thigh[0] + 0.004, thigh[0] + 0.006)
            tubes.append(_tube("bottom", hip, end, width, v=(v[0], end[1]), round_bottom=False))
        return tubes
    ease = {"slim": (0.002, 0.003, 0.004), "straight": (0.005, 0.010, 0.014), "wide": (0.008, 0.018, 0.030)}
    ease = ease.get(person.bottom_cut, ease["straight"])
    upper = (thigh[0] + ease[0], thigh[1] + ease[0], thigh[2] + ease[1])
    lower = (calf[0] + ease[1], calf[1] + ease[1], calf[2] + ease[2], calf[3] + ease[2])
    end = ankle + 0.06 * (ankle - knee)
    return [
        _tube("bottom", hip, knee, upper, v=v[:2]),
        _tube("bottom", knee, end, lower, v=v[1:], round_bottom=False),
        _tube("skin", knee, ankle, (0.025, 0.02)),
    ]


def _arms(person: Person, pose: Pose) -> list[Tube]:
    loose = {"hoodie": 0.010, "jacket": 0.010, "coat": 0.012, "shirt": 0.006, "tee": 0.008}.get(person.top_cut, 0.004)
    bare = {"vest": 0.0, "tee": 0.62, "dress": 0.35}.get(person.top_cut)
    thick, tubes = person.girth**0.6, []
    for side in (-1, 1):
        swing = -0.75 * pose.swing * np.cos(pose.phase + (np.pi if side < 0 else 0)) + 0.05
        bend, out = 0.25 + 0.5 * max(swing, 0.0), 0.13 + 0.10 * (person.girth - 1) + 0.5 * loose / 0.01 * 0.06
        if pose.raised == side:
            swing, bend = 0.25, 1.9
        elif person.bag == "hand" and person.bag_side == side:
            swing, bend = 0.3 * swing, 0.12
        shoulder = np.array((side * (0.103 * person.shoulders + 0.2 * loose), 0.792, -0.004))
        elbow = shoulder + 0.170 * np.array((side * np.sin(out), -np.cos(swing) * np.cos(out), np.sin(swing)))
        fore = swing + bend
        wrist = elbow + 0.145 * np.array((-side * 0.06, -np.cos(fore), np.sin(fore)))
        hand = wrist + 0.058 * np.array((0, -np.cos(fore + 0.2), np.sin(fore + 0.2)))
        upper, lower = (
            (0.026 * thick, 0.031 * thick, 0.029 * thick, 0.025 * thick),
            (0.025 * thick, 0.022 * thick, 0.016),
        )
        tubes.append(_tube("skin", wrist, hand, (0.014, 0.019, 0.012), (0.016, 0.022, 0.014)))
        v = (0.80, 0.63, 0.48)
        if bare is None:
            tubes.append(_tube("sleeve", shoulder, elbow, np.add(upper, (0.4 * loose, loose, loose, loose)), v=v[:2]))
            cuff = wrist - 0.03 * (wrist - elbow)
            tubes.append(_tube("sleeve", elbow, cuff, np.add(lower, loose), v=v[1:], round_bottom=False))
            continue
        tubes += [_tube("skin", shoulder, elbow, upper, v=v[:2]), _tube("skin", elbow, wrist, lower, v=v[1:])]
        if bare:
            end = shoulder + (bare + 0.15) * (elbow - shoulder)
            tubes.append(_tube("sleeve", shoulder, end, np.add(upper[:2], (0.002, loose)), v=v[:2], round_bottom=False))
    return tubes


def _head(person: Person, pose: Pose) -> list[Tube]:
    size, yaw, tubes = person.head, pose.head_yaw, []
    ahead, up = np.array((np.sin(yaw), 0.0, np.cos(yaw))), np.array((0.0, 1.0, 0.0))
    centre = np.array((0.0, 0.858, 0.012))
    flat, open_below = {"round_top": False, "round_bottom": False}, {"round_bottom": False}

    def add(fabric, high, low, a, b, back=0.0, **options):
        """From ``high`` down to ``low`` over the chin, ``back`` behind the middle of the head."""
        middle, a, b = centre - back * size * ahead, np.multiply(a, size), np.multiply(b, size)
        tubes.append(_tube(fabric, middle + high * size * up, middle + low * size * up, a, b, yaw=yaw, **options))

    t = 2 * _GRID - 1  # crown -1, chin 1
    egg = np.sqrt(np.clip(1 - t * t, 0.02, 1)) * np.where(t > 0, 1 - 0.16 * t * t, 1.0)
    add("head", 0.136, -0.006, 0.043 * egg, 0.055 * egg, v=(1, 0), **flat)

    style = person.hair_style
    if style == "short" and person.hat == "none":
        add("hair", 0.108, 0.085, (0.030, 0.044, 0.047), (0.040, 0.052, 0.050), 0.012)
    elif style == "bob":
        a, b = (0.034, 0.048, 0.052, 0.052, 0.048), (0.045, 0.052, 0.048, 0.042, 0.036)
        add("hair", 0.106, 0.0, a, b, 0.016, **open_below)
    elif style == "long":
        a, b = (0.034, 0.047, 0.050, 0.050, 0.052, 0.050, 0.040), (0.045, 0.050, 0.042, 0.034, 0.028, 0.024, 0.016)
        add("hair", 0.106, -0.11, a, b, 0.020)
    elif style in ("tail", "bun"):
        add("hair", 0.106, 0.06, (0.032, 0.045, 0.046), (0.042, 0.052, 0.046), 0.012)
        low, width = (0.06, 0.026) if style == "bun" else (-0.07, 0.017)
        add("hair", 0.10, low, (0.020, width, width, 0.012), (0.022, width, width, 0.012), 0.070)
    if person.hat == "cap":  # its peak; the crown is painted
        add("hat", 0.098, 0.086, (0.040, 0.042), 0.045, -0.055)
    elif person.hat == "beanie":
        a, b = (0.022, 0.044, 0.048, 0.047), (0.028, 0.054, 0.058, 0.057)
        add("hat", 0.126, 0.080, a, b, -0.002, **open_below)
    return tubes


def _bag(person: Person) -> list[Tube]:
    side, depth = person.bag_side, 0.060 * person.girth
    edge = np.array((0.75, 0.95, 1.0, 1.0, 1.0, 0.95, 0.8))
    if person.bag == "backpack":
        return [_tube("bag", (0, 0.800, -depth - 0.050), (0, 0.580, -depth - 0.058), 0.076 * edge, 0.046 * edge)]
    box = {"round_top": False, "round_bottom": False}
    if person.bag in ("shoulder", "cross"):
        x = side * (0.105 * person.hips + 0.035)
        return [_tube("bag", (x, 0.560, -0.015), (x, 0.460, -0.015), 0.026 * edge, 0.080 * edge, **box)]
    if person.bag == "hand":
        x = side * (0.104 * person.shoulders + 0.035)
        return [_tube("bag", (x, 0.405, 0.02), (x, 0.285, 0.02), (0.020, 0.026, 0.028), (0.050, 0.062, 0.072), **box)]
    return []
