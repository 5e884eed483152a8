# SPDX-License-Identifier: Apache-2.0
"""MSMT17 in its layouts."""

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)


def plant_msmt17(plant, folder, train="train", test="test"):
    """The official lists; pids of train and test overlap as numbers."""
    lists = {
        "list_train.txt": (train, ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_000_15_0303noon_1_0.jpg 1"]),
        "list_val.txt": (train, ["0000/0000_001_09_0303morning_0016_0.jpg 0"]),
        "list_query.txt": (test, ["0000/0000_000_02_0113noon_0001_0.jpg 0"]),
        "list_gallery.txt": (
            test,
            ["0000/0000_001_14_0113noon_0002_0.jpg 0", "0004/0004_000_03_0113noon_0003_0.jpg 4"],
        ),
    }
    for name, (images, lines) in lists.items():
        plant(f"{folder}/{images}", *(line.split()[0] for line in lines))
        (plant(folder) / name).write_text("\n".join(lines) + "\n")


class TestMSMT17:
    @pytest.mark.parametrize(
        ("folder", "train", "test"),
        [
            ("MSMT17_V1", "train", "test"),
            ("msmt17/MSMT17_V1", "train", "test"),
            ("MSMT17_V2", "mask_train_v2", "mask_test_v2"),
        ],
    )
    def test_official_lists(self, check, rows, tmp_path, plant, folder, train, test):
        plant_msmt17(plant, folder, train, test)
        data = check(load_dataset("msmt17", tmp_path))
        assert rows(data.train) == [
            ("0000_000_01_0303morning_0015_0.jpg", 0, 0),
            ("0000_001_09_0303morning_0016_0.jpg", 0, 8),  # of list_val
            ("0001_000_15_0303noon_1_0.jpg", 1, 14),
        ]
        assert rows(data.query) == [("0000_000_02_0113noon_0001_0.jpg", 0, 1)]
        assert [row[1:] for row in rows(data.gallery)] == [(0, 13), (4, 2)]
        assert (data.root, data.notes) == (tmp_path / folder, ())

    def test_v1_comes_before_v2_and_the_root_decides(self, tmp_path, plant):
        plant_msmt17(plant, "msmt17/MSMT17_V2", "mask_train_v2", "mask_test_v2")
        plant_msmt17(plant, "msmt17/MSMT17_V1")
        assert load_dataset("msmt17", tmp_path).root.name == "MSMT17_V1"
        assert load_dataset("msmt17", tmp_path / "msmt17" / "MSMT17_V2").root.name == "MSMT17_V2"

    @pytest.mark.parametrize("folder", [".", "MSMT17", "MSMT17_V1", "msmt17/MSMT17_V1"])
    def test_converted_with_two_digit_cameras(self, check, plant_market, rows, tmp_path, folder):
        names = ["0000_c1_0001.jpg", "0003_c15_0002.jpg"]
        plant_market(folder, names, ["0000_c10_0003.jpg"], ["0000_c2_0004.jpg"])
        data = check(load_dataset("msmt17", tmp_path))
        assert rows(data.train) == [("0000_c1_0001.jpg", 0, 0), ("0003_c15_0002.jpg", 1, 14)]
        assert rows(data.query) == [("0000_c10_0003.jpg", 0, 9)]

    def test_without_validation_list(self, tmp_path, plant):
        plant_msmt17(plant, "msmt17")
        (tmp_path / "msmt17" / "list_val.txt").unlink()
        data = load_dataset("msmt17", tmp_path)
        assert len(data.train) == 2
        assert "list_val.txt is missing" in data.notes[0]

    @pytest.mark.parametrize("line", ["word", "0000/0000.jpg 0", "0000/0000_000_16_x.jpg 0"])
    def test_bad_line(self, tmp_path, plant, line):
        plant_msmt17(plant, "msmt17")
        path = tmp_path / "msmt17" / "list_query.txt"
        path.write_text(path.read_text() + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"msmt17: list_query.txt line 3 must read .*, got '" + line):
            load_dataset("msmt17", tmp_path)

    def test_lists_that_point_nowhere(self, tmp_path, plant):
        plant_msmt17(plant, "msmt17")
        (tmp_path / "msmt17" / "test").rename(tmp_path / "msmt17" / "elsewhere")
        (tmp_path / "msmt17" / "test").mkdir()
        with pytest.raises(DatasetNotFound, match=r"list_query.txt must list images under test/, got .*0000_000_02"):
            load_dataset("msmt17", tmp_path)

    def test_images_without_lists_say_what_is_missing(self, tmp_path, plant):
        plant("MSMT17_V1/train/0000", "0000_000_01_a.jpg")
        plant("MSMT17_V1/test/0000", "0000_000_01_a.jpg")
        with pytest.raises(DatasetNotFound) as caught:
            load_dataset("msmt17", tmp_path)
        assert "train  test  list_train.txt  list_query.txt  list_gallery.txt" in str(caught.value)
        assert "MSMT17_V1  (holds test/, train/)" in str(caught.value)

    @pytest.mark.parametrize("part", ["train", "val", "query", "gallery"])
    def test_a_list_without_images(self, tmp_path, plant, part):
        plant_msmt17(plant, "msmt17")
        (tmp_path / "msmt17" / f"list_{part}.txt").write_text("\n")
        with pytest.raises(ValueError, match=rf"msmt17: .*list_{part}.txt must list images, got none"):
            load_dataset("msmt17", tmp_path)
