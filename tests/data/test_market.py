# SPDX-License-Identifier: Apache-2.0
"""Market-1501 and the sets that are laid out like it."""

import os

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)

MARKET = ("bounding_box_train", "query", "bounding_box_test")


class TestMarket1501:
    @pytest.mark.parametrize(
        "folder", [".", "market1501", "Market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"]
    )
    def test_every_nesting(self, check, plant_market1501, rows, tmp_path, folder):
        """Junk (-1), hidden files and Thumbs.db are not loaded; pid 0 is a distractor and stays."""
        plant_market1501(folder)
        data = check(load_dataset("market1501", tmp_path))
        train = [
            ("0002_c1s1_000451_03.jpg", 0, 0),
            ("0002_c3s1_000001_01.jpg", 0, 2),
            ("0007_c6s2_000451_03.jpg", 1, 5),
        ]
        assert rows(data.train) == train
        assert rows(data.query) == [("0001_c1s1_001051_00.jpg", 1, 0), ("0003_c2s1_000051_00.jpg", 3, 1)]
        gallery = [
            ("0000_c4s1_000001_01.jpg", 0, 3),
            ("0001_c2s1_002301_02.jpg", 1, 1),
            ("0003_c5s1_000001_01.jpg", 3, 4),
        ]
        assert rows(data.gallery) == gallery
        assert (data.name, data.has_pids, data.has_cameras, data.notes) == ("market1501", True, True, ())
        assert data.root == tmp_path / folder
        assert data.num_cameras == 3

    def test_neighbours_are_not_entered(self, plant_market1501, tmp_path):
        plant_market1501("dukemtmcreid/DukeMTMC-reID")
        plant_market1501("somewhere")
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path)
        plant_market1501("zzz/Market-1501")
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path)
        assert load_dataset("market1501", tmp_path / "zzz").root == tmp_path / "zzz" / "Market-1501"

    @pytest.mark.parametrize("name", ["0005_c7s1_000001_00.jpg", "1502_c1s1_000001_00.jpg"])
    def test_impossible_labels(self, plant_market1501, tmp_path, plant, name):
        plant_market1501("market1501")
        plant("market1501/query", name)
        with pytest.raises(ValueError, match=rf"market1501: (camera|pid) must .* got (7|1502) in .*{name}"):
            load_dataset("market1501", tmp_path)

    def test_names_that_do_not_parse_are_counted(self, plant_market1501, tmp_path, plant):
        plant_market1501("market1501")
        plant("market1501/query", "copy of 1.jpg", "readme.png")
        data = load_dataset("market1501", tmp_path)
        assert len(data.query) == 2
        assert data.notes == ("query: 2 images skipped, their names are not <pid>_c<camera>...",)

    def test_empty_folder(self, plant_market1501, tmp_path):
        plant_market1501("market1501")
        for path in (tmp_path / "market1501" / "query").glob("*.jpg"):
            path.unlink()
        with pytest.raises(ValueError, match=r"market1501: .*query must hold images named <pid>_c<camera>..., got 0"):
            load_dataset("market1501", tmp_path)


def test_dukemtmcreid(check, plant_market, rows, tmp_path):
    plant_market(
        "dukemtmcreid/DukeMTMC-reID",
        ["0001_c2_f0046182.jpg", "7139_c8_f0000001.jpg"],
        ["0005_c1_f0000002.jpg"],
        ["0005_c7_f0000003.jpg"],
    )
    data = check(load_dataset("DukeMTMC-reID", tmp_path))
    assert data.name == "dukemtmcreid"
    assert rows(data.train) == [("0001_c2_f0046182.jpg", 0, 1), ("7139_c8_f0000001.jpg", 1, 7)]
    assert rows(data.query) + rows(data.gallery) == [("0005_c1_f0000002.jpg", 5, 0), ("0005_c7_f0000003.jpg", 5, 6)]


@pytest.mark.parametrize("folder", ["personx/PersonX", "personx/subset1"])
def test_personx_cameras_are_mapped(check, plant_market, tmp_path, plant, folder):
    names = [f"0001_c{camera}_1.jpg" for camera in (3, 4, 8, 10, 11, 12)]
    plant_market(folder, names, ["0002_c3_1.jpg"], ["0002_c12_1.jpg"])
    data = check(load_dataset("personx", tmp_path))
    cameras = {os.path.basename(sample.path).split("_")[1]: sample.camid for sample in data.train}
    assert cameras == {"c3": 0, "c4": 1, "c8": 2, "c10": 3, "c11": 4, "c12": 5}
    plant(f"{folder}/query", "0002_c5_1.jpg")
    with pytest.raises(ValueError, match=r"personx: camera must be one of \[3, 4, 8, 10, 11, 12\], got 5"):
        load_dataset("personx", tmp_path)


VERI = ("image_train", "image_query", "image_test")


@pytest.mark.parametrize(("folder", "folders"), [("veri/VeRi", VERI), ("veri/VeRi_with_plate", VERI), ("VeRi", MARKET)])
def test_veri(check, plant_market, rows, tmp_path, folder, folders):
    train = ["0001_c001_00016450_0.jpg", "0776_c020_00016450_0.jpg"]
    plant_market(folder, train, ["0002_c002_00030600_0.jpg"], ["0002_c010_00030600_0.jpg"], folders)
    data = check(load_dataset("veri", tmp_path))
    assert rows(data.train) == [("0001_c001_00016450_0.jpg", 0, 0), ("0776_c020_00016450_0.jpg", 1, 19)]
    assert rows(data.gallery) == [("0002_c010_00030600_0.jpg", 2, 9)]
