# SPDX-License-Identifier: Apache-2.0
"""PKU VehicleID: list files, no cameras, query and gallery drawn at random from one test list."""

import os
from pathlib import Path

import numpy as np

from fastreid_u.data.dataset import ReIDDataset, Sample, relabel, sort_samples
from fastreid_u.data.locate import DatasetNotFound, shown

VEHICLEID_LAYOUTS = (("image", "train_test_split/train_list.txt"),)

_TEST_SIZES = (800, 1600, 2400)


def read_vehicleid(folder: Path, *, test_size: int = 800, seed: int = 0) -> ReIDDataset:
    """Read ``image/`` and ``train_test_split/``.

    Args:
        folder: holds both.
        test_size: vehicles in the test list: 800, 1600 or 2400.
        seed: draws the one gallery image of each vehicle; all its others are queries. Published figures average ten
            draws: load with ten seeds.

    Returns:
        ``has_cameras`` is False: evaluation must not remove same-camera matches, which would be all of them.

    Raises:
        ValueError: another test size, a line that is not ``<image> <vehicle>``, or a list without images.
        DatasetNotFound: the test list, or an image that a list names, is not there.
    """
    if test_size not in _TEST_SIZES:
        raise ValueError(f"vehicleid: test_size must be one of {_TEST_SIZES}, got {test_size}")
    train = _read_list(folder, "train_list.txt")
    test = _read_list(folder, f"test_list_{test_size}.txt")
    rng = np.random.default_rng(seed)
    of_vehicle: dict[int, list[Sample]] = {}
    for sample in test:
        of_vehicle.setdefault(sample.pid, []).append(sample)
    gallery = {of_vehicle[pid][rng.integers(len(of_vehicle[pid]))] for pid in sorted(of_vehicle)}
    return ReIDDataset(
        name="vehicleid",
        root=folder,
        train=relabel(train),
        query=tuple(sample for sample in test if sample not in gallery),
        gallery=tuple(sample for sample in test if sample in gallery),
        has_cameras=False,
        notes=(f"no cameras; one random gallery image of each of {test_size} vehicles, seed {seed}",),
    )


def _read_list(folder: Path, name: str) -> tuple[Sample, ...]:
    file = folder / "train_test_split" / name
    if not file.is_file():
        raise DatasetNotFound(f"vehicleid: {name} must lie in train_test_split/, got {sorted(os.listdir(file.parent))}")
    images = os.path.join(os.path.abspath(folder), "image")
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdecimal():
            raise ValueError(f"vehicleid: {name} line {number} must read <image> <vehicle>, got {line!r}")
        samples.append(Sample(os.path.join(images, fields[0] + ".jpg"), int(fields[1]), 0))
    if not samples:
        raise ValueError(f"vehicleid: {shown(file)} must list images, got none")
    if not os.path.exists(samples[0].path):
        raise DatasetNotFound(f"vehicleid: {shown(file)} must list images under image/, got {shown(samples[0].path)}")
    return sort_samples(samples)
