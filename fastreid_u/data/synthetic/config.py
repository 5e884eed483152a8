# SPDX-License-Identifier: Apache-2.0
"""The dials of the rendered data set."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

# Part of the cache key: raise it whenever a change of the renderer changes a single pixel.
RENDERER = 1

_COUNTS = {"train_ids": 0, "test_ids": 0, "cameras": 2, "images_per_camera": 2, "distractors": 0, "seed": 0}
_SHARES = ("camera_presence", "intruders", "texture", "occlusion", "background_mix")
_STRENGTHS = ("shift", "jitter", "yaw_std")


@dataclass(frozen=True)
class SyntheticConfig:
    """How many people, and how hard each known problem of Re-ID is.

    The same dials give the same bytes; another ``seed`` gives another world: other people and other cameras. Settings
    of a method are chosen on one seed and reported on another.

    Args:
        train_ids: people in ``bounding_box_train``, pids 1 to ``train_ids``.
        test_ids: people in ``query`` and ``bounding_box_test``, the pids after those of training; none is in both.
        cameras: number of cameras, 2 to 9.
        images_per_camera: crops of a person in each camera passed (2 or more: one is the query, the rest the gallery).
        camera_presence: probability that a person passes a camera; everybody passes at least two.
        distractors: further people, in the gallery only, all with pid 0.
        intruders: share of the training crops that show an empty background, another person or a badly placed box.
        palette: number of clothing colours (1 to 16), commonest first. Few: identities that colour cannot tell apart.
        texture: probability that a garment has a pattern (stripes, checks, a print, blocks of colour).
        shift: strength of the cameras' differences in colour cast, exposure, contrast and sunlight; 0: none.
        occlusion: probability that something or somebody stands in front of the person.
        jitter: strength of the error of the detection box; 0: always the same margin.
        background_mix: probability that the background is taken from another camera of the set.
        yaw_std: standard deviation, in radians, of the walking direction around the camera's usual one.
        height: image height in pixels, a multiple of 8 from 64.
        width: image width in pixels, a multiple of 8 from 32.
        seed: seed of the people, the cameras and the images.

    Raises:
        TypeError: a dial has the wrong type.
        ValueError: a dial is out of its range.
    """

    train_ids: int = 64
    test_ids: int = 64
    cameras: int = 6
    images_per_camera: int = 4
    camera_presence: float = 0.8
    distractors: int = 8
    intruders: float = 0.0
    palette: int = 16
    texture: float = 0.7
    shift: float = 0.2
    occlusion: float = 0.1
    jitter: float = 0.8
    background_mix: float = 0.0
    yaw_std: float = 0.5
    height: int = 128
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, number = getattr(self, field.name), (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, number):
                _reject(field.name, f"be {'an integer' if field.type is int else 'a number'}", value, TypeError)
        for name, least in _COUNTS.items():
            if getattr(self, name) < least:
                _reject(name, f"be {least} or more", getattr(self, name))
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                _reject(name, "lie in [0, 1]", getattr(self, name))
        for name in _STRENGTHS:
            if not 0 <= getattr(self, name) <= 4:
                _reject(name, "lie in [0, 4]", getattr(self, name))
        if self.cameras > 9:  # one digit of the file name in Market-1501 and in its readers
            _reject("cameras", "be 9 or less", self.cameras)
        if not 1 <= self.palette <= 16:
            _reject("palette", "lie in [1, 16]", self.palette)
        for name, least in (("height", 64), ("width", 32)):
            if getattr(self, name) % 8 or not least <= getattr(self, name) <= 1024:
                _reject(name, f"be a multiple of 8 in [{least}, 1024]", getattr(self, name))
        if not 1.5 <= self.height / self.width <= 4:
            _reject("height / width", "lie in [1.5, 4]", self.height / self.width)
        if self.train_ids + self.test_ids == 0:
            _reject("train_ids + test_ids", "be 1 or more", 0)
        if self.train_ids + self.test_ids > 9999:  # PPPP of the file name
            _reject("train_ids + test_ids", "be 9999 or less", self.train_ids + self.test_ids)

    def digest(self) -> str:
        """12 hexadecimal digits that name the dials and the renderer: the key of the cache."""
        dials = json.dumps({"renderer": RENDERER, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(dials.encode()).hexdigest()[:12]


def _reject(name: str, rule: str, value: object, kind: type[Exception] = ValueError) -> None:
    raise kind(f"synthetic: {name} must {rule}, got {value!r}")
