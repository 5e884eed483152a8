# SPDX-License-Identifier: Apache-2.0
"""VehicleID: lists, and a drawn gallery."""

import os

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)


class TestVehicleID:
    @pytest.fixture
    def root(self, plant, tmp_path):
        folder = plant("vehicleid/VehicleID_V1.0/image", *(f"{i:07d}.jpg" for i in range(30)))
        lists = folder.parent / "train_test_split"
        lists.mkdir()
        (lists / "train_list.txt").write_text("".join(f"{i:07d} {100 + i // 3}\n" for i in range(6)))
        (lists / "test_list_800.txt").write_text("".join(f"{i:07d} {i // 5}\n" for i in range(10, 30)))
        return tmp_path

    def test_one_gallery_image_of_each_vehicle(self, check, root):
        data = check(load_dataset("vehicleid", root))
        assert [sample.pid for sample in data.train] == [0, 0, 0, 1, 1, 1]
        assert [sample.pid for sample in data.gallery] == [2, 3, 4, 5]
        assert len(data.query) == 16
        assert not {sample.path for sample in data.query} & {sample.path for sample in data.gallery}
        assert not data.has_cameras
        assert "seed 0" in data.notes[0]
        assert "-" in data.table().splitlines()[2].split(" | ")[-1]

    def test_the_draw_is_seeded(self, root):
        def gallery(seed):
            return tuple(os.path.basename(s.path) for s in load_dataset("vehicleid", root, seed=seed).gallery)

        assert gallery(3) == gallery(3)
        assert len({gallery(seed) for seed in range(10)}) > 5

    def test_test_sizes(self, root):
        with pytest.raises(
            DatasetNotFound, match=r"test_list_2400.txt must lie .* got \['test_list_800.txt', 'train_list"
        ):
            load_dataset("vehicleid", root, test_size=2400)
        with pytest.raises(ValueError, match=r"test_size must be one of \(800, 1600, 2400\), got 500"):
            load_dataset("vehicleid", root, test_size=500)

    def test_bad_line(self, root):
        path = root / "vehicleid/VehicleID_V1.0/train_test_split/train_list.txt"
        path.write_text("0000000 one\n")
        with pytest.raises(ValueError, match=r"train_list.txt line 1 must read <image> <vehicle>, got '0000000 one'"):
            load_dataset("vehicleid", root)

    @pytest.mark.parametrize("name", ["train_list", "test_list_800"])
    def test_a_list_without_images(self, root, name):
        (root / f"vehicleid/VehicleID_V1.0/train_test_split/{name}.txt").write_text("\n")
        with pytest.raises(ValueError, match=rf"vehicleid: .*{name}.txt must list images, got none"):
            load_dataset("vehicleid", root)
