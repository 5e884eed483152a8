# SPDX-License-Identifier: Apache-2.0
"""Readers: every data set and layout of docs/datasets.md on a small tree with the true names, and what goes wrong."""

import json
import os
import subprocess
import sys

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    ReIDDataset,
    Sample,
    dataset_names,
    known_name,
    load_dataset,
    make_loader,
    test_transform,
)

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


def plant_market1501(plant, folder):
    plant_market(
        plant,
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


class TestMarket1501:
    @pytest.mark.parametrize(
        "folder", [".", "market1501", "Market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"]
    )
    def test_every_nesting(self, tmp_path, plant, folder):
        """Junk (-1), hidden files and Thumbs.db are not loaded; pid 0 is a distractor and stays."""
        plant_market1501(plant, folder)
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

    def test_neighbours_are_not_entered(self, tmp_path, plant):
        plant_market1501(plant, "dukemtmcreid/DukeMTMC-reID")
        plant_market1501(plant, "somewhere")
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path)
        plant_market1501(plant, "zzz/Market-1501")
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path)
        assert load_dataset("market1501", tmp_path / "zzz").root == tmp_path / "zzz" / "Market-1501"

    @pytest.mark.parametrize("name", ["0005_c7s1_000001_00.jpg", "1502_c1s1_000001_00.jpg"])
    def test_impossible_labels(self, tmp_path, plant, name):
        plant_market1501(plant, "market1501")
        plant("market1501/query", name)
        with pytest.raises(ValueError, match=rf"market1501: (camera|pid) must .* got (7|1502) in .*{name}"):
            load_dataset("market1501", tmp_path)

    def test_names_that_do_not_parse_are_counted(self, tmp_path, plant):
        plant_market1501(plant, "market1501")
        plant("market1501/query", "copy of 1.jpg", "readme.png")
        data = load_dataset("market1501", tmp_path)
        assert len(data.query) == 2
        assert data.notes == ("query: 2 images skipped, their names are not <pid>_c<camera>...",)

    def test_empty_folder(self, tmp_path, plant):
        plant_market1501(plant, "market1501")
        for path in (tmp_path / "market1501" / "query").glob("*.jpg"):
            path.unlink()
        with pytest.raises(ValueError, match=r"market1501: .*query must hold images named <pid>_c<camera>..., got 0"):
            load_dataset("market1501", tmp_path)


def test_dukemtmcreid(tmp_path, plant):
    plant_market(
        plant,
        "dukemtmcreid/DukeMTMC-reID",
        ["0001_c2_f0046182.jpg", "7139_c8_f0000001.jpg"],
        ["0005_c1_f0000002.jpg"],
        ["0005_c7_f0000003.jpg"],
    )
    data = check(load_dataset("DukeMTMC-reID", tmp_path))
    assert data.name == "dukemtmcreid"
    assert rows(data.train) == [("0001_c2_f0046182.jpg", 0, 1), ("7139_c8_f0000001.jpg", 1, 7)]
    assert rows(data.query) + rows(data.gallery) == [("0005_c1_f0000002.jpg", 5, 0), ("0005_c7_f0000003.jpg", 5, 6)]


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
    def test_official_lists(self, tmp_path, plant, folder, train, test):
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
    def test_converted_with_two_digit_cameras(self, tmp_path, plant, folder):
        names = ["0000_c1_0001.jpg", "0003_c15_0002.jpg"]
        plant_market(plant, folder, names, ["0000_c10_0003.jpg"], ["0000_c2_0004.jpg"])
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


def plant_cuhk03(plant, folder, variant):
    """As torchreid writes it: the JSON holds the paths of the machine that made it."""
    splits = {
        "train": [["/home/me/images/1_001_1_01.png", 0, 0], ["C:\\data\\1_002_2_06.png", 1, 1]],
        "query": [["/home/me/images/2_001_1_01.png", 3, 0]],
        "gallery": [["/home/me/images/2_001_2_06.png", 3, 1], ["/home/me/images/2_002_2_07.png", 9, 1]],
    }
    names = [path.replace("\\", "/").rsplit("/", 1)[1] for entries in splits.values() for path, _, _ in entries]
    plant(f"{folder}/images_{variant}", *names)
    entries = {**splits, "num_train_pids": 2}
    (plant(folder) / f"splits_new_{variant}.json").write_text(json.dumps([entries]))


class TestCUHK03:
    def test_torchreid_split(self, tmp_path, plant):
        for variant in ("labeled", "detected"):
            plant_cuhk03(plant, "cuhk03", variant)
        data = check(load_dataset("cuhk03", tmp_path))
        assert rows(data.train) == [("1_001_1_01.png", 0, 0), ("1_002_2_06.png", 1, 1)]
        assert rows(data.query) == [("2_001_1_01.png", 3, 0)]
        assert rows(data.gallery) == [("2_001_2_06.png", 3, 1), ("2_002_2_07.png", 9, 1)]
        assert data.notes == ("boxes: detected",)
        labeled = check(load_dataset("cuhk03", tmp_path, variant="labeled"))
        assert labeled.notes == ("boxes: labeled",)
        assert "images_labeled" in labeled.train[0].path

    @pytest.mark.parametrize("folder", ["cuhk03", "cuhk03/labeled", "cuhk03-np/labeled"])
    def test_market_like_folders(self, tmp_path, plant, folder):
        plant_market(plant, folder, ["0001_c1_1.png", "0004_c2_1.png"], ["0002_c1_1.png"], ["0002_c2_1.png"])
        data = check(load_dataset("cuhk03", tmp_path))
        assert rows(data.train) == [("0001_c1_1.png", 0, 0), ("0004_c2_1.png", 1, 1)]
        assert data.notes == (("boxes: labeled",) if folder.endswith("labeled") else ())
        variant = {"variant": "labeled"} if folder.endswith("labeled") else {}
        assert load_dataset("cuhk03", data.root, **variant) == data, "a run finds it again by its root and options"

    def test_variant_that_is_not_there(self, tmp_path, plant):
        plant_cuhk03(plant, "cuhk03", "labeled")
        assert load_dataset("cuhk03", tmp_path).notes == ("boxes: labeled",)
        with pytest.raises(DatasetNotFound, match=r"variant must exist under .*cuhk03, got 'detected'"):
            load_dataset("cuhk03", tmp_path, variant="detected")
        with pytest.raises(ValueError, match=r"variant must be .* got 'both'"):
            load_dataset("cuhk03", tmp_path, variant="both")

    @pytest.mark.parametrize("text", ["{", "[]", '{"train": []}', '[{"train": [["a.png"]]}]'])
    def test_broken_split(self, tmp_path, plant, text):
        plant_cuhk03(plant, "cuhk03", "detected")
        (tmp_path / "cuhk03" / "splits_new_detected.json").write_text(text)
        with pytest.raises(ValueError, match=r"splits_new_detected.json must be a list with one split"):
            load_dataset("cuhk03", tmp_path)

    def test_split_that_names_other_images(self, tmp_path, plant):
        plant_cuhk03(plant, "cuhk03", "detected")
        (tmp_path / "cuhk03" / "images_detected" / "2_001_1_01.png").unlink()
        with pytest.raises(DatasetNotFound, match=r"must list images under .*images_detected"):
            load_dataset("cuhk03", tmp_path)


@pytest.mark.parametrize("folder", ["personx/PersonX", "personx/subset1"])
def test_personx_cameras_are_mapped(tmp_path, plant, folder):
    names = [f"0001_c{camera}_1.jpg" for camera in (3, 4, 8, 10, 11, 12)]
    plant_market(plant, folder, names, ["0002_c3_1.jpg"], ["0002_c12_1.jpg"])
    data = check(load_dataset("personx", tmp_path))
    cameras = {os.path.basename(sample.path).split("_")[1]: sample.camid for sample in data.train}
    assert cameras == {"c3": 0, "c4": 1, "c8": 2, "c10": 3, "c11": 4, "c12": 5}
    plant(f"{folder}/query", "0002_c5_1.jpg")
    with pytest.raises(ValueError, match=r"personx: camera must be one of \[3, 4, 8, 10, 11, 12\], got 5"):
        load_dataset("personx", tmp_path)


VERI = ("image_train", "image_query", "image_test")


@pytest.mark.parametrize(("folder", "folders"), [("veri/VeRi", VERI), ("veri/VeRi_with_plate", VERI), ("VeRi", MARKET)])
def test_veri(tmp_path, plant, folder, folders):
    train = ["0001_c001_00016450_0.jpg", "0776_c020_00016450_0.jpg"]
    plant_market(plant, folder, train, ["0002_c002_00030600_0.jpg"], ["0002_c010_00030600_0.jpg"], folders)
    data = check(load_dataset("veri", tmp_path))
    assert rows(data.train) == [("0001_c001_00016450_0.jpg", 0, 0), ("0776_c020_00016450_0.jpg", 1, 19)]
    assert rows(data.gallery) == [("0002_c010_00030600_0.jpg", 2, 9)]


class TestVehicleID:
    @pytest.fixture
    def root(self, plant, tmp_path):
        folder = plant("vehicleid/VehicleID_V1.0/image", *(f"{i:07d}.jpg" for i in range(30)))
        lists = folder.parent / "train_test_split"
        lists.mkdir()
        (lists / "train_list.txt").write_text("".join(f"{i:07d} {100 + i // 3}\n" for i in range(6)))
        (lists / "test_list_800.txt").write_text("".join(f"{i:07d} {i // 5}\n" for i in range(10, 30)))
        return tmp_path

    def test_one_gallery_image_of_each_vehicle(self, root):
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


class TestVehicleX:
    def test_names(self, tmp_path, plant):
        plant("vehiclex/AIC20_ReID_Simulation/image_train", "0001_c006_1.jpg", "0001_c036_2.jpg", "1362_c010_1.jpg")
        data = check(load_dataset("vehiclex", tmp_path))
        assert rows(data.train) == [("0001_c006_1.jpg", 0, 0), ("0001_c036_2.jpg", 0, 2), ("1362_c010_1.jpg", 1, 1)]
        assert (data.query, data.gallery) == ((), ())

    def test_xml(self, tmp_path, plant):
        folder = plant("AIC21_Track2_ReID_Simulation/sys_image_train", "000001.jpg", "000002.jpg").parent
        items = '<Item imageName="000001.jpg" vehicleID="0009" cameraID="c007" colorID="5"/>'
        head = '<?xml version="1.0" encoding="gb2312"?>\n<TrainingImages><Items number="2">'
        (folder / "train_label.xml").write_text(f"{head}{items}</Items></TrainingImages>")
        with pytest.raises(ValueError, match=r"train_label.xml must label every image, got none for .*000002.jpg"):
            load_dataset("vehiclex", tmp_path)
        items += '<Item imageName="000002.jpg" vehicleID="0003" cameraID="c031"/>'
        (folder / "train_label.xml").write_text(f"{head}{items}</Items></TrainingImages>")
        assert rows(check(load_dataset("vehiclex", tmp_path)).train) == [("000001.jpg", 1, 0), ("000002.jpg", 0, 1)]
        (folder / "train_label.xml").unlink()
        with pytest.raises(ValueError, match=r"images must be named .* or listed in train_label.xml"):
            load_dataset("vehiclex", tmp_path)


def test_luperson_shards(tmp_path, plant):
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


def test_synthetic_is_rendered_then_read_as_market1501(tmp_path):
    dials = {"train_ids": 3, "test_ids": 2, "cameras": 2, "distractors": 1, "height": 64, "width": 32}
    data = check(load_dataset("synthetic", tmp_path, **dials))
    assert data.name == "synthetic"
    assert {sample.pid for sample in data.train} == {0, 1, 2}
    assert data.query
    assert load_dataset("synthetic", tmp_path, **dials) == data  # from the cache
    with pytest.raises(TypeError, match=r"options of synthetic must be among .* got 'dial'"):
        load_dataset("synthetic", tmp_path, dial=3)


class TestLoadDataset:
    def test_names(self):
        assert set(dataset_names()) >= {"market1501", "msmt17", "cuhk03", "personx", "veri", "vehicleid", "synthetic"}
        for name in ("market1501", "Market-1501", "MARKET1501", "market", "Market-1501-v15.09.15"):
            assert known_name(name) == "market1501"
        assert known_name("VeRi-776") == "veri"
        assert known_name("Synthetic") == "synthetic"
        assert known_name("elsewhere/market1501") is None
        assert known_name("crops") is None
        assert all(known_name(name) == name for name in dataset_names())

    def test_unknown_name(self, tmp_path):
        with pytest.raises(DatasetNotFound, match=r"got 'makret1501'. Did you mean market1501\?"):
            load_dataset("makret1501", tmp_path)
        with pytest.raises(DatasetNotFound, match=r"existing folder or CSV file, got 'qqqqqq'.$"):
            load_dataset("qqqqqq", tmp_path)
        with pytest.raises(ValueError, match="name must not be empty"):
            load_dataset("", tmp_path)

    def test_unknown_option(self, tmp_path, plant):
        with pytest.raises(TypeError, match=r"options of vehicleid must be among \(test_size, seed\), got 'size'"):
            load_dataset("vehicleid", tmp_path, size=800)
        with pytest.raises(TypeError, match=r"among \(layout, pattern\), got 'variant'"):
            load_dataset(plant("crops", "a.jpg"), variant="x")

    def test_not_found_says_where_what_and_who(self, tmp_path, plant):
        plant("market1501/Market-1501/query", "0001_c1s1_1.jpg")
        with pytest.raises(DatasetNotFound) as caught:
            load_dataset("market1501", tmp_path)
        text = str(caught.value)
        assert f"market1501 must lie under its root, got {tmp_path}" in text
        assert "bounding_box_train  query  bounding_box_test" in text
        assert f"{tmp_path}/market1501/Market-1501  (holds query/)" in text
        assert "Zheng et al., ICCV 2015" in text
        assert "FASTREID_U_DATA" in text
        assert isinstance(caught.value, FileNotFoundError)

    def test_duke_is_withdrawn(self, tmp_path):
        with pytest.raises(
            DatasetNotFound, match="withdrawn by Duke University in 2019 and nobody grants access"
        ) as caught:
            load_dataset("dukemtmcreid", tmp_path / "nowhere")
        assert f"{tmp_path}/nowhere  (no such file or directory)" in str(caught.value)

    def test_root_from_the_environment(self, tmp_path, plant, monkeypatch):
        plant_market1501(plant, "here/market1501")
        monkeypatch.setenv("FASTREID_U_DATA", str(tmp_path / "here"))
        assert len(load_dataset("market1501").train) == 3
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path / "there")  # the argument wins

    def test_default_root_is_data(self, tmp_path, plant, monkeypatch):
        plant_market1501(plant, "data/market1501")
        monkeypatch.delenv("FASTREID_U_DATA", raising=False)
        monkeypatch.chdir(tmp_path)
        assert len(check(load_dataset("market1501")).train) == 3

    def test_folder_under_the_root(self, tmp_path, plant):
        plant("crops", "1.jpg")
        assert len(load_dataset("crops", tmp_path).train) == 1

    def test_what_was_read_can_be_loaded(self, tmp_path, plant):
        plant_market1501(plant, "market1501")
        data = load_dataset("market1501", tmp_path)
        (batch,) = make_loader(data.train, test_transform(8, 4), batch_size=8)
        assert batch.images.shape == (3, 3, 8, 4)
        assert batch.bad == []


def test_table():
    train = tuple(Sample(f"/{i}", i % 1234, i % 6) for i in range(2468))
    query = (Sample("/q", 7, 0), Sample("/r", 7, 1))
    assert ReIDDataset("x", None, train, query).table() == (
        "subset  | # ids | # images | # cameras\n"
        "--------+-------+----------+----------\n"
        "train   | 1,234 |    2,468 |         6\n"
        "query   |     1 |        2 |         2\n"
        "gallery |     - |        0 |         -"
    )
    unlabelled = ReIDDataset("x", None, (Sample("/a", -1, 0),), has_pids=False, has_cameras=False)
    assert unlabelled.table().splitlines()[2] == "train   |     - |        1 |         -"


def test_a_package_import_is_light():
    """Reading data sets needs neither torchvision nor, before an image is opened, torch or Pillow."""
    code = "import sys; from fastreid_u.data import load_dataset, dataset_names; load_dataset; dataset_names(); "
    code += "print([m for m in ('torch', 'torchvision', 'PIL', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
