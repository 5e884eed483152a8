# SPDX-License-Identifier: Apache-2.0
"""One's own crops: folders in every arrangement that is understood."""

import os

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)
from fastreid_u.data.locate import list_images


class TestFolder:
    def test_flat_without_labels(self, check, rows, plant):
        data = check(load_dataset(plant("crops", "b.jpg", "a.png", "c.txt", ".hidden.jpg")))
        assert rows(data.train) == [("a.png", -1, 0), ("b.jpg", -1, 0)]
        assert (data.name, data.has_pids, data.has_cameras) == ("crops", False, False)
        assert data.notes == ("folder: no labels",)

    def test_by_identity(self, check, plant):
        data = check(load_dataset(plant("crops", "tom/1.jpg", "tom/2.jpg", "ann/1.jpg")))
        assert [sample.pid for sample in data.train] == [0, 1, 1]
        assert not data.has_cameras
        assert data.notes == ("folder: one sub-folder for each identity",)

    def test_numeric_identities_sort_as_numbers(self, check, plant):
        data = check(load_dataset(plant("crops", "10/1.jpg", "9/1.jpg", "007/1.jpg")))
        assert {os.path.basename(os.path.dirname(s.path)): s.pid for s in data.train} == {"007": 0, "9": 1, "10": 2}

    @pytest.mark.parametrize(
        "names", [("c1", "c2", "c10"), ("cam_1", "Cam_2", "CAM_10"), ("camera1", "camera2", "camera10")]
    )
    def test_by_camera(self, check, plant, names):
        data = check(load_dataset(plant("crops", *(f"{name}/x.jpg" for name in names))))
        assert (data.has_pids, data.has_cameras, data.num_cameras) == (False, True, 3)
        assert data.notes == ("folder: one sub-folder for each camera",)

    def test_one_camera_is_no_camera(self, check, plant):
        data = check(load_dataset(plant("crops", "1_c1_a.jpg", "1_c1_b.jpg", "2_c1_a.jpg")))
        assert [sample.pid for sample in data.train] == [0, 0, 1]
        assert not data.has_cameras
        assert data.notes == ("folder: names <pid>_c<camera>", "one camera only: cameras are not used")

    def test_market_names_only_if_all_fit(self, check, rows, plant):
        folder = plant("crops", "0005_c7s1_1.jpg", "deep/er/0002_c3s1_1.jpg", "0005_c3.jpg")
        data = check(load_dataset(folder))
        assert sorted(rows(data.train)) == [("0002_c3s1_1.jpg", 0, 0), ("0005_c3.jpg", 1, 0), ("0005_c7s1_1.jpg", 1, 1)]
        plant("crops", "holiday.jpg")
        assert check(load_dataset(folder)).notes == ("folder: no labels",)
        with pytest.raises(ValueError, match=r"pattern must fit every image, got 'holiday.jpg'"):
            load_dataset(folder, layout="market")

    def test_nested_deeper_than_one_is_unlabelled(self, check, plant):
        data = check(load_dataset(plant("crops", "a/x/1.jpg", "b/1.jpg")))
        assert data.notes == ("folder: no labels",)
        assert len(data.train) == 2

    def test_big_sub_folders_are_shards(self, plant):
        folder = plant("crops", *(f"a/{i}.jpg" for i in range(500)), "b/1.jpg")
        assert load_dataset(folder).has_pids
        plant("crops", "a/one more.jpg")
        assert not load_dataset(folder).has_pids
        assert load_dataset(folder, layout="by-identity").has_pids

    def test_layout_overrules_the_guess(self, check, plant):
        folder = plant("crops", "c1/1.jpg", "c2/1.jpg")
        assert [s.pid for s in check(load_dataset(folder, layout="by-identity")).train] == [0, 1]
        assert load_dataset(folder, layout="flat").notes == ("folder: no labels",)
        with pytest.raises(ValueError, match=r"layout must be one of .* got 'nested'"):
            load_dataset(folder, layout="nested")

    def test_splits(self, check, plant):
        names = [
            "train/x/1.jpg",
            "train/2.jpg",
            "query/17/a.jpg",
            "gallery/17/c.jpg",
            "gallery/99/a.jpg",
            "extra/1.jpg",
        ]
        data = check(load_dataset(plant("crops", *names, "query/23/b.jpg")))
        assert (len(data.train), data.has_pids) == (2, False)
        assert [sample.pid for sample in data.query] == [17, 23]  # as written
        assert [sample.pid for sample in data.gallery] == [17, 99]
        assert data.notes[1:] == (
            "query: one sub-folder for each identity",
            "gallery: one sub-folder for each identity",
            "extra: 1 images left out, no part of the split is called so",
        )
        plant("crops", "query/nobody.jpg")
        with pytest.raises(ValueError, match=r"query and gallery images must have an identity, got none"):
            load_dataset(plant("crops"))

    def test_market_folders_under_a_path(self, check, plant_market, rows, plant):
        plant_market("mine", ["5000_c9_a.jpg", "1_c40_a.jpg"], ["7_c9_a.jpg"], ["7_c40_a.jpg", "-1_c9_b.jpg"])
        data = check(load_dataset(plant("mine")))
        assert rows(data.train) == [("1_c40_a.jpg", 0, 1), ("5000_c9_a.jpg", 1, 0)]
        assert rows(data.gallery) == [("7_c40_a.jpg", 7, 1)]

    def test_market_folders_with_one_camera(self, check, plant_market, plant):
        plant_market("mine", ["1_c4_a.jpg"], ["7_c4_a.jpg"], ["7_c4_b.jpg"])
        assert not check(load_dataset(plant("mine"))).has_cameras

    def test_pattern(self, check, rows, plant):
        folder = plant("crops", "north/person12_a.jpg", "south/person3_b.jpg", "south/person12_c.jpg")
        data = check(load_dataset(folder, pattern=r"(?P<camid>\w+)/person(?P<pid>\d+)_"))
        assert rows(data.train) == [("person12_a.jpg", 1, 0), ("person12_c.jpg", 1, 1), ("person3_b.jpg", 0, 1)]
        assert check(load_dataset(folder, pattern=r"person(?P<pid>\d+)")).has_cameras is False
        with pytest.raises(ValueError, match="pattern must have a group named pid or camid"):
            load_dataset(folder, pattern=r"person(\d+)")
        with pytest.raises(ValueError, match=r"pattern must fit every image, got 'north/person12_a.jpg'"):
            load_dataset(folder, pattern=r"south/person(?P<pid>\d+)")

    def test_empty(self, tmp_path):
        with pytest.raises(ValueError, match="must hold images, got none"):
            load_dataset(tmp_path)

    def test_links(self, check, rows, tmp_path, plant):
        """Links are followed; "crop" next to "crops" is not its parent."""
        plant("crop", "2.jpg")
        plant("crops", "1.jpg")
        (tmp_path / "crops" / "more").symlink_to(tmp_path / "crop")
        data = check(load_dataset(tmp_path / "crops"))
        assert rows(data.train) == [("1.jpg", -1, 0), ("2.jpg", -1, 0)]

    @pytest.mark.parametrize("inside", ["runs/crops-spcl", "."])
    def test_a_run_inside_is_no_part_of_it(self, check, plant, inside):
        """``cd crops; fastreid-u train .`` leaves ./runs; its curves are no crop."""
        folder = plant("crops", "a/1.jpg", "b/1.jpg", f"{inside}/curves.png")
        for name in ("config.toml", "metrics.jsonl"):
            (folder / inside / name).touch()
        assert [os.path.relpath(s.path, folder) for s in check(load_dataset(folder)).train] == ["a/1.jpg", "b/1.jpg"]
        (folder / inside / "metrics.jsonl").unlink()
        assert len(load_dataset(folder).train) == 3, "one such file may be the user's own"

    def test_what_is_called_like_an_image(self, plant):
        """Folders are entered, pipes never opened, dead links reported when read."""
        folder = plant("crops", "a.jpg/1.jpg", "b.PNG/2.jpg", "3.jpg")
        os.mkfifo(folder / "pipe.jpg")
        (folder / "to pipe.jpg").symlink_to("pipe.jpg")
        (folder / "dead.jpg").symlink_to("gone")
        (folder / "self.jpg").symlink_to("self.jpg")
        found = list_images(folder, recursive=True)
        assert [os.path.relpath(path, folder) for path in found] == [
            "3.jpg", "a.jpg/1.jpg", "b.PNG/2.jpg", "dead.jpg", "self.jpg"
        ]  # fmt: skip
        assert [os.path.basename(path) for path in list_images(folder)] == ["3.jpg", "dead.jpg", "self.jpg"]

    def test_links_in_a_circle(self, check, tmp_path, plant):
        folder = plant("crops", "1.jpg", "inner/2.jpg")
        (folder / "inner" / "up").symlink_to(folder)
        (folder / "again").symlink_to(folder / "inner")
        (folder / "inner" / "self").symlink_to(folder / "inner")
        data = check(load_dataset(folder))
        assert [os.path.relpath(sample.path, folder) for sample in data.train] == ["1.jpg", "inner/2.jpg"]


def test_luperson_shards(check, tmp_path, plant):
    plant("luperson", "shard0/a/1.jpg", "shard0/b/1.JPG", "shard1/2.png", "shard1/list.txt", "3.jpeg")
    data = check(load_dataset("luperson", tmp_path))
    assert [os.path.relpath(s.path, tmp_path / "luperson") for s in data.train] == [
        "3.jpeg",
        "shard0/a/1.jpg",
        "shard0/b/1.JPG",
        "shard1/2.png",
    ]
    assert (data.has_pids, data.has_cameras) == (False, False)
    with pytest.raises(DatasetNotFound, match="in a folder of that name"):
        load_dataset("luperson", tmp_path / "luperson" / "shard1")
