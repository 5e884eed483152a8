# SPDX-License-Identifier: Apache-2.0
"""One crop: a person walking through the view of a camera, cut out by an imperfect detector."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from fastreid_u.data.synthetic.body import Pose, make_body
from fastreid_u.data.synthetic.camera import Camera, develop, make_camera
from fastreid_u.data.synthetic.cloth import paint, wrinkles
from fastreid_u.data.synthetic.config import SyntheticConfig
from fastreid_u.data.synthetic.identity import Person, make_person
from fastreid_u.data.synthetic.occluders import stand_in_front
from fastreid_u.data.synthetic.scene import HEIGHT, WIDTH, Scene, make_scene
from fastreid_u.data.synthetic.shading import View, project, rasterise, shade

SUPERSAMPLE = 2
# First word of every random stream, so that no two kinds of thing share one.
_PERSON, _CAMERA, _SCENE, _SHOT = range(4)


@dataclass(frozen=True)
class Shot:
    """Who (``person``: a number of the world, not the pid), in which camera, which time, and what went wrong."""

    person: int
    camera: int
    take: int
    intruder: str = ""  # "", "empty", "stranger" or "badbox"


class World:
    """The people and cameras of one configuration; made when first needed, kept."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self._scenes: dict[int, Scene] = {}
        self.cameras = [make_camera(self._rng(_CAMERA, c), config.shift) for c in range(config.cameras)]
        self.person = lru_cache(256)(self._person)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *key))

    def _person(self, number: int) -> Person:
        return make_person(self._rng(_PERSON, number), self.config.palette, self.config.texture)

    def scene(self, camera: int) -> Scene:
        if camera not in self._scenes:
            self._scenes[camera] = make_scene(self._rng(_SCENE, camera), self.cameras[camera])
        return self._scenes[camera]

    def shoot(self, shot: Shot) -> bytes:
        """The JPEG file of a shot: a function of the configuration and the shot alone."""
        config, camera = self.config, self.cameras[shot.camera]
        # One stream for each part of the picture, and what a dial may discard is drawn all the same: so a dial
        # changes what it says and nothing else.
        rng, street, sensor = self._rng(_SHOT, shot.person, shot.camera, shot.take).spawn(3)
        mixed, other, back, lone, hidden, way = rng.random(6)
        scene = self.scene(int(other * config.cameras) if mixed < config.background_mix else shot.camera)
        person = _stranger(street) if shot.intruder == "stranger" else self.person(shot.person)
        row, column = rng.uniform(), rng.uniform(0.12, 0.88) * WIDTH
        row = scene.walk[0] + row * (scene.walk[1] - scene.walk[0])
        distance, drop = scene.distance(row), scene.lens - 0.55 * person.stature
        view = View(
            yaw=camera.axis + (np.pi if back < 0.4 else 0.0) + config.yaw_std * rng.normal(),
            pitch=float(np.arctan2(drop, distance)),
            distance=float(np.hypot(distance, drop)),
        )
        box = config.jitter * rng.normal(0, (0.045, 0.025, 0.05))
        if shot.intruder == "badbox":
            box += (street.choice((-0.45, 0.45)), street.choice((-0.35, 0.0, 0.35)), 0.5)
        figure = _Figure(config, person, _pose(rng, person), view, box)
        picture = self._background(scene, figure, row, column)
        if lone < 0.15:
            self._passer_by(picture, camera, figure, street, behind=True)
        if shot.intruder != "empty":
            body = figure.draw(camera, rng)
            _cast_shadow(picture, body, figure, camera)
            _over(picture, body)
        if hidden < config.occlusion:
            if way < 0.45:
                self._passer_by(picture, camera, figure, street, behind=False)
            else:
                stand_in_front(picture, street)
        slope = np.linspace(-1, 1, config.height, dtype=np.float32) * np.float32(sensor.normal(0, 0.05))
        picture *= (1 + slope)[:, None, None]
        return develop(camera, picture, sensor)

    def _background(self, scene: Scene, figure: "_Figure", row: float, column: float) -> np.ndarray:
        """Linear RGB of the frame's window in which the figure stands with its feet at (column, row)."""
        config = self.config
        zoom = scene.pixels_per_metre(row) / figure.scale  # frame pixels per pixel of the crop
        zoom = min(zoom, HEIGHT / config.height, WIDTH / config.width)
        wide, tall = config.width * zoom, config.height * zoom
        left = max(min(column - figure.foot_column * zoom, WIDTH - wide), 0.0)
        top = max(min(row - figure.foot_row * zoom, HEIGHT - tall), 0.0)
        window = (left, top, min(left + wide, WIDTH), min(top + tall, HEIGHT))
        crop = scene.picture.resize((config.width, config.height), Image.Resampling.BILINEAR, box=window)
        return (np.asarray(crop, np.float32) * np.float32(1 / 255)) ** 2

    def _passer_by(self, picture: np.ndarray, camera: Camera, main: "_Figure", rng, *, behind: bool) -> None:
        """Another person, farther away and higher up, or nearer and cutting into the crop."""
        stranger, side = _stranger(rng), rng.choice((-0.5, 0.5))
        size, offset = (
            rng.uniform(*pair) for pair in (((0.62, 0.85), (0.35, 1.0)) if behind else ((1.0, 1.2), (0.35, 0.65)))
        )
        view = replace(main.view, yaw=main.view.yaw + rng.uniform(-1, 1))
        figure = _Figure(self.config, stranger, _pose(rng, stranger), view, np.array((side * offset, 0, 0)), size)
        # the ground rises in the picture: feet farther away stand higher
        figure.move_feet(main.foot_row + (size - 1) * self.config.height * 0.45)
        body = figure.draw(camera, rng)
        if behind:
            _cast_shadow(picture, body, figure, camera)
        _over(picture, body)


class _Figure:
    """A posed person on the canvas; ``box``: the detector's error in x, y and size, as shares of the crop's height."""

    def __init__(self, config, person: Person, pose: Pose, view: View, box: np.ndarray, size: float = 1.0) -> None:
        self.person, self.view, self.shape = person, view, (config.height, config.width)
        self.body = make_body(person, pose)
        self._drawing = project(self.body, view, person.stature)
        left, top, right, bottom = self._drawing.extent()
        fill = 0.93 * np.exp(-box[2]) * size
        self.scale = fill * config.height / (bottom - top)  # pixels per metre
        x = 0.5 * config.width + box[0] * config.height - 0.5 * (left + right) * self.scale
        y = (0.5 + box[1]) * config.height - 0.5 * (top + bottom) * self.scale
        self.foot_row, self.foot_column = y + bottom * self.scale, x
        self._x, self._y = x, y

    def move_feet(self, row: float) -> None:
        self._y += row - self.foot_row
        self.foot_row = row

    def draw(self, camera: Camera, rng: np.random.Generator) -> np.ndarray:
        """Premultiplied linear RGBA (H, W, 4) float32."""
        s = SUPERSAMPLE
        shape, scale = (self.shape[0] * s, self.shape[1] * s), self.scale * s
        drawing = self._drawing.placed(scale, self._x * s, self._y * s)
        surface = rasterise(self.body, drawing, self.view, shape, scale)
        rgba = np.zeros((*shape, 4), np.float32)
        row, column = rng.integers(0, 512, 2)
        if surface is not None:
            albedo, fold = paint(surface, self.body, self.person)
            height, width = fold.shape
            step = 132 / scale  # the folds' size belongs to the cloth, not to the image
            rows, columns = (
                (start + np.arange(n) * step).astype(int) % 512 for start, n in ((row, height), (column, width))
            )
            depth = surface.depth + wrinkles()[rows[:, None], columns] * fold * np.float32(0.004 * scale)
            rgba[surface.window][..., :3] = shade(depth, albedo, camera.light, scale) * surface.seen[..., None]
            rgba[surface.window][..., 3] = surface.seen
        half = rgba[0::s] + rgba[1::s]
        return (half[:, 0::s] + half[:, 1::s]) * np.float32(0.25)


def _stranger(rng: np.random.Generator) -> Person:
    """Somebody else, whatever the dials of the people in the set."""
    return make_person(rng)


def _pose(rng: np.random.Generator, person: Person) -> Pose:
    standing = rng.random() < 0.15
    return Pose(
        phase=float(rng.uniform(0, 2 * np.pi)),
        swing=float((0.10 if standing else 0.45) * person.stride * rng.uniform(0.8, 1.15)),
        head_yaw=float(rng.normal(0, 0.35)),
        raised=int(rng.choice((-1, 0, 1), p=(0.05, 0.9, 0.05))),
    )


def _over(picture: np.ndarray, body: np.ndarray) -> None:
    picture *= 1 - body[..., 3:]
    picture += body[..., :3]


def _cast_shadow(picture: np.ndarray, body: np.ndarray, figure: _Figure, camera: Camera) -> None:
    """The silhouette laid down on the ground away from the sun, and the dark between sole and ground."""
    sx, sy, sz = camera.light.sun
    row, column = figure.foot_row - 0.02 * picture.shape[0], figure.foot_column
    drop = -sz / sy * np.sin(figure.view.pitch)
    drop = np.copysign(max(abs(drop), 0.06), drop)
    # inverse map: the shadow at (x, y) is cast by the silhouette at height (y - row) / drop above the feet
    inverse = (1, sx / sy / drop, -sx / sy * row / drop, 0, -1 / drop, row + row / drop)
    shape = Image.fromarray((body[..., 3] * 255).astype(np.uint8))
    laid = shape.transform(shape.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    laid = np.asarray(laid.filter(ImageFilter.GaussianBlur(1.0)), np.float32) / 255
    height, width = body.shape[:2]
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    spread, flat = 0.10 * height, 0.022 * height
    contact = np.exp(-(((x - column) / spread) ** 2) - ((y - row) / flat) ** 2)
    direct = camera.light.sun_colour[1] / (camera.light.sun_colour[1] + camera.light.sky_colour[1])
    dark = 1 - np.float32(0.75 * direct) * laid
    picture *= (dark * (1 - 0.45 * contact))[..., None]
