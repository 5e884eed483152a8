# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: which are known, where they are looked for, and what is named when they are not there."""

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


def test_synthetic_is_rendered_then_read_as_market1501(check, tmp_path):
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

    def test_root_from_the_environment(self, plant_market1501, tmp_path, monkeypatch):
        plant_market1501("here/market1501")
        monkeypatch.setenv("FASTREID_U_DATA", str(tmp_path / "here"))
        assert len(load_dataset("market1501").train) == 3
        with pytest.raises(DatasetNotFound):
            load_dataset("market1501", tmp_path / "there")  # the argument wins

    def test_default_root_is_data(self, check, plant_market1501, tmp_path, monkeypatch):
        plant_market1501("data/market1501")
        monkeypatch.delenv("FASTREID_U_DATA", raising=False)
        monkeypatch.chdir(tmp_path)
        assert len(check(load_dataset("market1501")).train) == 3

    def test_folder_under_the_root(self, tmp_path, plant):
        plant("crops", "1.jpg")
        assert len(load_dataset("crops", tmp_path).train) == 1

    def test_what_was_read_can_be_loaded(self, plant_market1501, tmp_path):
        plant_market1501("market1501")
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
