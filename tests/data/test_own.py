# SPDX-License-Identifier: Apache-2.0
"""One's own crops: folders in every arrangement that is understood, and CSV lists."""

import csv
import os

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    Sample,
    load_dataset,
)
from fastreid_u.data.locate import list_images

MARKET = ("bounding_box_train", "query", "bounding_box_test")


def rows(samples):
    """(file name, pid, camid) of each sample."""
    return [(os.path.basename(sample.path), sample.pid, sample.camid) for sample in samples]


def check(dataset):
    """What holds for every data set; returned for more."""
    for split in (dataset.train, dataset.query, dataset.gallery):
        assert list(split) == sorted(split, key=lambda sample: sample.path)
        assert all(os.path.isabs(sample.path) and os.path.isfile(sample.path) for sample in split)
        assert all(type(sample) is Sample and sample.camid >= 0 for sample in split)
    pids = {sample.pid for sample in dataset.train}
    assert pids == (set(range(len(pids))) if dataset.has_pids else {-1})
    assert all(sample.pid >= 0 for sample in (*dataset.query, *dataset.gallery))
    return dataset


def plant_market(plant, folder, train, query, gallery, folders=MARKET):
    for part, names in zip(folders, (train, query, gallery), strict=True):
        plant(f"{folder}/{part}", *names)


class TestFolder:
    def test_flat_without_labels(self, plant):
        data = check(load_dataset(plant("crops", "b.jpg", "a.png", "c.txt", ".hidden.jpg")))
        assert rows(data.train) == [("a.png", -1, 0), ("b.jpg", -1, 0)]
        assert (data.name, data.has_pids, data.has_cameras) == ("crops", False, False)
        assert data.notes == ("folder: no labels",)

    def test_by_identity(self, plant):
        data = check(load_dataset(plant("crops", "tom/1.jpg", "tom/2.jpg", "ann/1.jpg")))
        assert [sample.pid for sample in data.train] == [0, 1, 1]
        assert not data.has_cameras
        assert data.notes == ("folder: one sub-folder for each identity",)

    def test_numeric_identities_sort_as_numbers(self, plant):
        data = check(load_dataset(plant("crops", "10/1.jpg", "9/1.jpg", "007/1.jpg")))
        assert {os.path.basename(os.path.dirname(s.path)): s.pid for s in data.train} == {"007": 0, "9": 1, "10": 2}

    @pytest.mark.parametrize(
        "names", [("c1", "c2", "c10"), ("cam_1", "Cam_2", "CAM_10"), ("camera1", "camera2", "camera10")]
    )
    def test_by_camera(self, plant, names):
        data = check(load_dataset(plant("crops", *(f"{name}/x.jpg" for name in names))))
        assert (data.has_pids, data.has_cameras, data.num_cameras) == (False, True, 3)
        assert data.notes == ("folder: one sub-folder for each camera",)

    def test_one_camera_is_no_camera(self, plant):
        data = check(load_dataset(plant("crops", "1_c1_a.jpg", "1_c1_b.jpg", "2_c1_a.jpg")))
        assert [sample.pid for sample in data.train] == [0, 0, 1]
        assert not data.has_cameras
        assert data.notes == ("folder: names <pid>_c<camera>", "one camera only: cameras are not used")

    def test_market_names_only_if_all_fit(self, plant):
        folder = plant("crops", "0005_c7s1_1.jpg", "deep/er/0002_c3s1_1.jpg", "0005_c3.jpg")
        data = check(load_dataset(folder))
        assert sorted(rows(data.train)) == [("0002_c3s1_1.jpg", 0, 0), ("0005_c3.jpg", 1, 0), ("0005_c7s1_1.jpg", 1, 1)]
        plant("crops", "holiday.jpg")
        assert check(load_dataset(folder)).notes == ("folder: no labels",)
        with pytest.raises(ValueError, match=r"pattern must fit every image, got 'holiday.jpg'"):
            load_dataset(folder, layout="market")

    def test_nested_deeper_than_one_is_unlabelled(self, plant):
        data = check(load_dataset(plant("crops", "a/x/1.jpg", "b/1.jpg")))
        assert data.notes == ("folder: no labels",)
        assert len(data.train) == 2

    def test_big_sub_folders_are_shards(self, plant):
        folder = plant("crops", *(f"a/{i}.jpg" for i in range(500)), "b/1.jpg")
        assert load_dataset(folder).has_pids
        plant("crops", "a/one more.jpg")
        assert not load_dataset(folder).has_pids
        assert load_dataset(folder, layout="by-identity").has_pids

    def test_layout_overrules_the_guess(self, plant):
        folder = plant("crops", "c1/1.jpg", "c2/1.jpg")
        assert [s.pid for s in check(load_dataset(folder, layout="by-identity")).train] == [0, 1]
        assert load_dataset(folder, layout="flat").notes == ("folder: no labels",)
        with pytest.raises(ValueError, match=r"layout must be one of .* got 'nested'"):
            load_dataset(folder, layout="nested")

    def test_splits(self, plant):
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
        )
        plant("crops", "query/nobody.jpg")
        with pytest.raises(ValueError, match=r"query and gallery images must have an identity, got none"):
            load_dataset(plant("crops"))

    def test_market_folders_under_a_path(self, plant):
        plant_market(plant, "mine", ["5000_c9_a.jpg", "1_c40_a.jpg"], ["7_c9_a.jpg"], ["7_c40_a.jpg", "-1_c9_b.jpg"])
        data = check(load_dataset(plant("mine")))
        assert rows(data.train) == [("1_c40_a.jpg", 0, 1), ("5000_c9_a.jpg", 1, 0)]
        assert rows(data.gallery) == [("7_c40_a.jpg", 7, 1)]

    def test_market_folders_with_one_camera(self, plant):
        plant_market(plant, "mine", ["1_c4_a.jpg"], ["7_c4_a.jpg"], ["7_c4_b.jpg"])
        assert not check(load_dataset(plant("mine"))).has_cameras

    def test_pattern(self, plant):
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

    def test_links(self, tmp_path, plant):
        """Links are followed; "crop" next to "crops" is not its parent."""
        plant("crop", "2.jpg")
        plant("crops", "1.jpg")
        (tmp_path / "crops" / "more").symlink_to(tmp_path / "crop")
        data = check(load_dataset(tmp_path / "crops"))
        assert rows(data.train) == [("1.jpg", -1, 0), ("2.jpg", -1, 0)]

    @pytest.mark.parametrize("inside", ["runs/crops-spcl", "."])
    def test_a_run_inside_is_no_part_of_it(self, plant, inside):
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

    def test_links_in_a_circle(self, tmp_path, plant):
        folder = plant("crops", "1.jpg", "inner/2.jpg")
        (folder / "inner" / "up").symlink_to(folder)
        (folder / "again").symlink_to(folder / "inner")
        (folder / "inner" / "self").symlink_to(folder / "inner")
        data = check(load_dataset(folder))
        assert [os.path.relpath(sample.path, folder) for sample in data.train] == ["1.jpg", "inner/2.jpg"]


class TestCSV:
    @pytest.fixture
    def listed(self, plant, tmp_path):
        """``listed(text)`` writes the CSV file next to the images crops/a.jpg to crops/d.jpg."""
        plant("crops", "a.jpg", "b.jpg", "c.jpg", "d.jpg")

        def write(text, encoding="utf-8"):
            path = tmp_path / "list.csv"
            path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
            return path

        return write

    def test_all_columns(self, listed):
        text = "path,pid,camid,split,colour\ncrops/b.jpg,,north gate,train,red\ncrops/a.jpg,,lobby,,blue\n"
        text += "crops/c.jpg,17,north gate,query,\ncrops/d.jpg,17,lobby,gallery,\n"
        data = check(load_dataset(listed(text)))
        assert rows(data.train) == [("a.jpg", -1, 0), ("b.jpg", -1, 1)]
        assert rows(data.query) == [("c.jpg", 17, 1)]
        assert rows(data.gallery) == [("d.jpg", 17, 0)]
        assert (data.name, data.has_pids, data.has_cameras) == ("list", False, True)

    def test_paths_only_with_a_byte_order_mark(self, listed):
        data = check(load_dataset(listed("path\r\ncrops/a.jpg\r\ncrops/b.jpg\r\n", "utf-8-sig")))
        assert [row[0] for row in rows(data.train)] == ["a.jpg", "b.jpg"]
        assert not data.has_cameras

    def test_absolute_paths(self, listed, tmp_path):
        data = check(load_dataset(listed(f"path, pid\n{tmp_path}/crops/a.jpg, ann\ncrops/b.jpg, tom\n")))
        assert rows(data.train) == [("a.jpg", 0, 0), ("b.jpg", 1, 0)]

    def test_junk_in_the_gallery_is_not_loaded(self, listed):
        text = "path,pid,split\ncrops/a.jpg,-1,\ncrops/b.jpg,3,query\ncrops/c.jpg,-1,gallery\ncrops/d.jpg,3,gallery\n"
        data = check(load_dataset(listed(text)))
        assert rows(data.train) == [("a.jpg", -1, 0)]  # in training -1 is "unknown"
        assert rows(data.gallery) == [("d.jpg", 3, 0)]

    def test_some_cameras_missing(self, listed):
        data = check(load_dataset(listed("path,camid\ncrops/a.jpg,1\ncrops/b.jpg,2\ncrops/c.jpg,\n")))
        assert not data.has_cameras
        assert data.notes == ("1 images have no camera: cameras are not used",)

    def test_some_identities_missing(self, listed):
        """The known ones count, in the table and wherever labels are looked at."""
        data = load_dataset(listed("path,pid\ncrops/a.jpg,9\ncrops/b.jpg,\ncrops/c.jpg,9\ncrops/d.jpg,4\n"))
        assert [sample.pid for sample in data.train] == [1, -1, 1, 0]
        assert data.has_pids
        assert data.notes[0].startswith("1 of 4 training images have no identity")
        assert data.table().splitlines()[2].split(" | ")[1].strip() == "2"

    @pytest.mark.parametrize(
        "content", [b"\xff\xfe\x00\x01 not text", b'path\n"' + b"x" * (csv.field_size_limit() + 1)]
    )
    def test_not_text(self, listed, content):
        with pytest.raises(ValueError, match=r"list.csv must be a CSV file in UTF-8, got "):
            load_dataset(listed(content))

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("", ValueError, r"header with a path column, got \[\]"),
            ("file\na.jpg\n", ValueError, r"header with a path column, got \['file'\]"),
            ("path\n", ValueError, "at least one training image"),
            ("path,pid\n,3\n", ValueError, "path must not be empty"),
            ("path,split\ncrops/a.jpg,val\n", ValueError, "split must be one of .* got 'val' .*line 2"),
            ("path,split\ncrops/a.jpg,train\ncrops/b.jpg,query\n", ValueError, "must have an identity"),
            ("path\ncrops/gone.jpg\n", DatasetNotFound, "must exist, relative to its folder"),
            ('path\n"a\x00', (ValueError, DatasetNotFound), "must"),
        ],
    )
    def test_rejects(self, listed, text, error, message):
        with pytest.raises(error, match=message):
            load_dataset(listed(text))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (None, TypeError, "name must be a name or a path, got None"),
        ("crops/a.jpg", ValueError, r"name must be a folder or a CSV file, got the image .*a\.jpg"),
    ],
)
def test_what_is_neither_folder_nor_list_is_named(plant, tmp_path, name, error, message):
    plant("crops", "a.jpg")
    with pytest.raises(error, match=message):
        load_dataset(name, tmp_path)
