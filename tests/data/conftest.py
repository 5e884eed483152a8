# SPDX-License-Identifier: Apache-2.0
"""What the tests of readers share: small trees of images, and what holds for every data set."""

import os

import pytest

from fastreid_u.data import Sample

MARKET = ("bounding_box_train", "query", "bounding_box_test")


@pytest.fixture
def rows():
    """``rows(samples)``: (file name, pid, camid) of each."""
    return lambda samples: [(os.path.basename(sample.path), sample.pid, sample.camid) for sample in samples]


@pytest.fixture
def check():
    """``check(dataset)``: what holds for every data set; returned for more."""

    def checked(dataset):
        for split in (dataset.train, dataset.query, dataset.gallery):
            assert list(split) == sorted(split, key=lambda sample: sample.path)
            assert all(os.path.isabs(sample.path) and os.path.isfile(sample.path) for sample in split)
            assert all(type(sample) is Sample and sample.camid >= 0 for sample in split)
        pids = {sample.pid for sample in dataset.train}
        assert pids == (set(range(len(pids))) if dataset.has_pids else {-1})
        assert all(sample.pid >= 0 for sample in (*dataset.query, *dataset.gallery))
        return dataset

    return checked


@pytest.fixture
def plant_market(plant):
    """``plant_market(folder, train, query, gallery)``: images of these names in the folders of Market-1501."""

    def write(folder, train, query, gallery, folders=MARKET):
        for part, names in zip(folders, (train, query, gallery), strict=True):
            plant(f"{folder}/{part}", *names)

    return write


@pytest.fixture
def plant_market1501(plant, plant_market):
    """``plant_market1501(folder)``: a small Market-1501 with junk, a distractor and files that are no images."""

    def write(folder):
        plant_market(
            folder,
            ["0007_c6s2_000451_03.jpg", "0002_c1s1_000451_03.jpg", "0002_c3s1_000001_01.jpg"],
            ["0001_c1s1_001051_00.jpg", "0003_c2s1_000051_00.jpg"],
            [
                "0001_c2s1_002301_02.jpg",
                "0003_c5s1_000001_01.jpg",
                "0000_c4s1_000001_01.jpg",
                "-1_c1s1_000401_03.jpg",
                "._0001_c2s1_002301_02.jpg",
            ],
        )
        for part in MARKET:
            (plant(f"{folder}/{part}") / "Thumbs.db").write_bytes(b"x")

    return write
