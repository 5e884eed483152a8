# SPDX-License-Identifier: Apache-2.0
"""CUHK03 in its layouts."""

import json

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)


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
    def test_torchreid_split(self, check, rows, tmp_path, plant):
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
    def test_market_like_folders(self, check, plant_market, rows, tmp_path, folder):
        plant_market(folder, ["0001_c1_1.png", "0004_c2_1.png"], ["0002_c1_1.png"], ["0002_c2_1.png"])
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

    @pytest.mark.parametrize("part", ["train", "query", "gallery"])
    def test_a_split_without_images(self, tmp_path, plant, part):
        plant_cuhk03(plant, "cuhk03", "detected")
        file = tmp_path / "cuhk03" / "splits_new_detected.json"
        file.write_text(json.dumps([{**json.loads(file.read_text())[0], part: []}]))
        with pytest.raises(ValueError, match=rf"cuhk03: .*splits_new_detected.json must list {part} images, got none"):
            load_dataset("cuhk03", tmp_path)
