# SPDX-License-Identifier: Apache-2.0
"""What a list of files reads, a folder reads; other files are counted in a note; names never steer a terminal."""

import pytest
from PIL import Image

from fastreid_u.data import DatasetNotFound, images, load_dataset
from fastreid_u.data.locate import IMAGE_SUFFIXES, list_files, shown

OTHERS = ("a.avif", "b.AVIF", "clip.mp4", "c.jpg_", "no suffix")
SIDECARS = ("list.txt", "x.json", "labels.mat", "Thumbs.db", "README", ".hidden.avif", "desktop.ini", "y.csv")
NOTE = "5 files left out, of types that are not read: 2 .avif, 1 .jpg_, 1 .mp4, 1 without suffix"


def test_every_suffix_of_every_format_that_is_decoded():
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in images._FORMATS}
    assert known - {".pfm"} == set(IMAGE_SUFFIXES) & known  # .pfm holds floats, which are refused
    assert set(IMAGE_SUFFIXES) <= known


def test_a_folder_reads_what_a_list_reads(plant, tmp_path):
    names = [f"{i}{suffix}" for i, suffix in enumerate([*IMAGE_SUFFIXES, ".JPG", ".JFIF", ".Gif"])]
    folder = plant("crops", *names)
    (tmp_path / "list.csv").write_text("\n".join(["path", *(f"crops/{name}" for name in names)]))
    listed, found = load_dataset(tmp_path / "list.csv"), load_dataset(folder)
    assert len(found.train) == len(names)
    assert found.train == listed.train
    assert found.notes == ("folder: no labels",)


class TestOtherFilesAreCounted:
    def test_in_a_folder(self, plant):
        data = load_dataset(plant("crops", "a.jpg", "sub/b.jpg", *OTHERS, *SIDECARS))
        assert len(data.train) == 2
        assert data.notes == ("folder: no labels", f"folder: {NOTE}")

    def test_in_the_folders_of_a_split(self, plant):
        data = load_dataset(plant("crops", "train/1/a.jpg", "train/2/b.webm", "Test/3/a.jpg", "Test/4/b.avif"))
        assert "train: 1 files left out, of types that are not read: 1 .webm" in data.notes
        assert "Test: 1 images left out, it is the gallery only where there is a query folder" in data.notes

    @pytest.mark.parametrize("name", ["market1501", "./market"])
    def test_in_the_folders_of_market1501(self, plant_market1501, plant, tmp_path, monkeypatch, name):
        plant_market1501("market")
        plant("market/bounding_box_train", *OTHERS, "0009/0009_c1_a.jpg")
        monkeypatch.chdir(tmp_path)
        notes = load_dataset(name, tmp_path).notes
        assert notes == ("bounding_box_train: 1 images in sub-folders left out", f"bounding_box_train: {NOTE}")

    def test_in_luperson_and_vehiclex(self, plant, tmp_path):
        plant("luperson/shard", "a.jpg", *OTHERS)
        assert load_dataset("luperson", tmp_path).notes == ("no labels", f"folder: {NOTE}")
        plant("vehiclex/image_train", "1_c6.jpg", "2_c7.jpg", *OTHERS)
        plant("vehiclex/sys_image_train", "1_c6.jpg")
        assert load_dataset("vehiclex", tmp_path).notes == (
            "sys_image_train: left out, image_train is used",
            f"image_train: {NOTE}",
        )

    def test_where_nothing_else_is(self, plant):
        folder = plant("crops", *OTHERS)
        with pytest.raises(
            ValueError, match=r"crops must hold images, got none \(folder: 5 files left out, .*2 \.avif"
        ):
            load_dataset(folder)

    def test_kinds_without_end(self, plant):
        (note,) = list_files(plant("crops", *(f"crop.{i:03d}" for i in range(9)), "a.jpg")).notes("here")
        assert note.endswith("1 .000, 1 .001, 1 .002, 1 .003, 1 .004, 1 .005, ...")


@pytest.mark.parametrize("name", ["a.jfif", "a.gif", "a.JPE", "a.pnm"])
def test_one_image_is_named_as_such(plant, tmp_path, name):
    plant("crops", name)
    with pytest.raises(ValueError, match=r"must be a folder or a CSV file, got the image"):
        load_dataset(tmp_path / "crops" / name)


class TestNamesInMessages:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a\nb", r"a\nb"),
            ("\x1b[31mred", r"\x1b[31mred"),
            ("a\u202eb\u2028", r"a\u202eb\u2028"),
            ("\udcff.jpg", r"\udcff.jpg"),
            ("näh 人\u3000 \\n", "näh 人\u3000 \\n"),
        ],
    )
    def test_what_steers_a_terminal_becomes_an_escape(self, name, text):
        assert shown(name) == text

    def test_in_notes_and_errors_of_readers(self, plant, tmp_path):
        bad = "a\n\x1b[2J"
        plant(bad, "train/1/a.jpg", "train/2/a.jpg", f"{bad}/b.jpg", f"train/{bad}.{bad}")
        for note in load_dataset(tmp_path / bad).notes:
            assert note.isprintable()
        (tmp_path / "list.csv").write_text(
            f'path,pid,split,"{bad}"\n"{bad}/train/1/a.jpg",,query\n"{bad}/train/2/a.jpg",,train\n'
        )
        (tmp_path / "gone.csv").write_text(f'path\n"{bad}/gone.jpg"\n')
        for read, error in (
            (lambda: load_dataset(tmp_path / "list.csv"), ValueError),
            (lambda: load_dataset(tmp_path / "gone.csv"), DatasetNotFound),
            (lambda: load_dataset(plant(f"{bad}2", "test/1.jpg", f"{bad}.jpg")), ValueError),
            (lambda: load_dataset(plant(f"{bad}3/{bad}", "train/1.jpg", "test/1.jpg").parent), ValueError),
            (lambda: load_dataset("market1501", tmp_path / bad), DatasetNotFound),
        ):
            with pytest.raises(error) as caught:
                read()
            assert "\x1b" not in str(caught.value)
