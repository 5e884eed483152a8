# SPDX-License-Identifier: Apache-2.0
"""One's own crops in a CSV list."""

import csv

import pytest

from fastreid_u.data import (
    DatasetNotFound,
    load_dataset,
)


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

    def test_all_columns(self, check, rows, listed):
        text = "path,pid,camid,split,colour\ncrops/b.jpg,,north gate,train,red\ncrops/a.jpg,,lobby,,blue\n"
        text += "crops/c.jpg,17,north gate,query,\ncrops/d.jpg,17,lobby,gallery,\n"
        data = check(load_dataset(listed(text)))
        assert rows(data.train) == [("a.jpg", -1, 0), ("b.jpg", -1, 1)]
        assert rows(data.query) == [("c.jpg", 17, 1)]
        assert rows(data.gallery) == [("d.jpg", 17, 0)]
        assert (data.name, data.has_pids, data.has_cameras) == ("list", False, True)

    def test_paths_only_with_a_byte_order_mark(self, check, rows, listed):
        data = check(load_dataset(listed("path\r\ncrops/a.jpg\r\ncrops/b.jpg\r\n", "utf-8-sig")))
        assert [row[0] for row in rows(data.train)] == ["a.jpg", "b.jpg"]
        assert not data.has_cameras

    def test_absolute_paths(self, check, rows, listed, tmp_path):
        data = check(load_dataset(listed(f"path, pid\n{tmp_path}/crops/a.jpg, ann\ncrops/b.jpg, tom\n")))
        assert rows(data.train) == [("a.jpg", 0, 0), ("b.jpg", 1, 0)]

    def test_junk_in_the_gallery_is_not_loaded(self, check, rows, listed):
        text = "path,pid,split\ncrops/a.jpg,-1,\ncrops/b.jpg,3,query\ncrops/c.jpg,-1,gallery\ncrops/d.jpg,3,gallery\n"
        data = check(load_dataset(listed(text)))
        assert rows(data.train) == [("a.jpg", -1, 0)]  # in training -1 is "unknown"
        assert rows(data.gallery) == [("d.jpg", 3, 0)]

    def test_some_cameras_missing(self, check, listed):
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
