# SPDX-License-Identifier: Apache-2.0
"""Pipes and devices where files are expected are refused; opening one would wait for a writer, for ever."""

import os

import pytest

from fastreid_u.data import DatasetNotFound, Sample, load_dataset, make_loader, test_transform

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_and_a_device_among_images_are_bad_images(plant, workers):
    folder = plant("crops", "a.jpg")
    os.mkfifo(folder / "b.jpg")
    paths = [folder / "a.jpg", folder / "b.jpg", "/dev/zero", folder]
    loader = make_loader(
        [Sample(str(path), 0, 0) for path in paths], test_transform(8, 4), batch_size=4, workers=workers
    )
    (loaded,) = loader
    loader.close()
    assert loaded.indices.tolist() == [0]
    assert [bad.reason for bad in loaded.bad] == ["not a file"] * 3


def test_a_pipe_in_a_folder_is_no_image(plant):
    folder = plant("crops", "a.jpg", "c.jpg")
    os.mkfifo(folder / "b.jpg")
    assert [os.path.basename(sample.path) for sample in load_dataset(folder).train] == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize("name", ["list_train.txt", "list_query.txt", "list_gallery.txt"])
def test_a_pipe_in_place_of_a_list_is_no_list(plant, name):
    folder = plant("MSMT17_V1", "train/0000/0000_000_01_0303morning_0015_0.jpg", "test/x.jpg")
    for each in ("list_train.txt", "list_query.txt", "list_gallery.txt"):
        os.mkfifo(folder / each) if each == name else (folder / each).write_text("")
    with pytest.raises(DatasetNotFound, match="msmt17 must lie under its root"):
        load_dataset("msmt17", folder)


def test_a_pipe_and_a_device_are_no_csv(tmp_path):
    os.mkfifo(tmp_path / "list.csv")
    for path in (tmp_path / "list.csv", "/dev/zero"):
        with pytest.raises(DatasetNotFound, match="an existing folder or CSV file"):
            load_dataset(path)
