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

    def test_columns_and_splits_in_capitals(self, check, listed):
        """Read as ours, the split above all: its rows would be trained on otherwise."""
        text = "Path,PID,CamID,Split\ncrops/a.jpg,1,1,Train\ncrops/b.jpg,1,2,TRAIN\n"
        data = check(load_dataset(listed(text + "crops/c.jpg,2,1,Query\ncrops/d.jpg,2,2,GALLERY\n")))
        assert tuple(map(len, (data.train, data.query, data.gallery))) == (2, 1, 1)
        assert data.has_train_cameras
        assert data.notes == ()

    def test_columns_that_are_not_read_are_named(self, listed):
        """A split under another name, say; a column that is called exactly like ours is ours."""
        data = load_dataset(listed(",path,Path,subset,colour\n0,crops/a.jpg,x,train,red\n1,crops/b.jpg,y,test,red\n"))
        assert len(data.train) == 2
        assert data.notes == ("columns not read: Path, subset, colour",)

    def test_rows_without_a_split_among_others(self, listed):
        data = load_dataset(listed("path,pid,split\ncrops/a.jpg,1\ncrops/b.jpg,2,query\ncrops/c.jpg,2,gallery,\n"))
        assert tuple(map(len, (data.train, data.query, data.gallery))) == (1, 1, 1)
        assert data.notes == ("1 images without a split are training images",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "path,pid\ncrops/a,b.jpg,3\n",
                r"at most the header's 2 cells, got more in .*list.csv line 2; a path with",
            ),
            ("path,pid,pid\ncrops/a.jpg,3,4\n", r"one column pid, got \['path', 'pid', 'pid'\]"),
            ("path,Split,SPLIT\ncrops/a.jpg,train,test\n", "one column split, got"),
            ("path,split\ncrops/a.jpg,train\ncrops/b.jpg,unknown\n", "got 'unknown' in .* line 3"),
            ("path,split\nnan,train\n", "path must not be empty"),
        ],
    )
    def test_what_would_shift_labels_or_splits_is_refused(self, listed, text, message):
        with pytest.raises(ValueError, match=message):
            load_dataset(listed(text))


class TestCamerasOfOnePart:
    """Cameras of the test decide the evaluation, those of training decide the training."""

    @pytest.fixture
    def read(self, plant, tmp_path):
        """``read(train, test)``: cameras of the training images, and of three queries and three gallery images."""

        def listed(train, test):
            rows = [f"{i},{camera},train" for i, camera in enumerate(train)]
            rows += [f"{i % 3},{camera},{'query' if i < 3 else 'gallery'}" for i, camera in enumerate(test)]
            plant("", *(f"{i}.jpg" for i in range(len(rows))))
            lines = ["path,pid,camid,split", *(f"{i}.jpg,{row}" for i, row in enumerate(rows))]
            (tmp_path / "list.csv").write_text("\n".join(lines))
            return load_dataset(tmp_path / "list.csv")

        return listed

    blind = "training does without cameras"
    seen = "a query is also ranked against images of its own camera"

    @pytest.mark.parametrize(
        ("train", "test", "used", "notes"),
        [
            ("1212", "111222", (True, True), ()),
            (["1", "2", ""], "111222", (False, True),
             (f"1 of 3 training images have no camera: {blind}",)),
            ([""] * 3, "111222", (False, True),
             (f"3 of 3 training images have no camera: {blind}",)),
            ("999", "111222", (False, True), (f"training images are of one camera only: {blind}",)),
            ("1212", ["1", "1", "", "2", "2", "2"], (True, False),
             (f"1 of 6 query and gallery images have no camera: {seen}",)),
            ("1212", "111111", (True, False),
             (f"query and gallery images are of one camera only: {seen}",)),
            ([""] * 3, [""] * 6, (False, False), ()),
            ("111", "111111", (False, False), ("one camera only: cameras are not used",)),
        ],
    )  # fmt: skip
    def test_neither_part_decides_for_the_other(self, read, train, test, used, notes):
        data = read(train, test)
        assert (data.has_train_cameras, data.has_test_cameras) == used
        assert (data.has_cameras, data.notes) == (any(used), notes)
        cells = [line.split(" | ")[-1].strip() for line in data.table().splitlines()[2:]]
        assert [cell != "-" for cell in cells] == [used[0], used[1], used[1]]

    def test_one_numbering_for_all_parts(self, read):
        data = read("3939", "333999")
        assert [sample.camid for sample in data.train] == [0, 1, 0, 1]
        assert {sample.camid for sample in data.query} == {0}
        assert {sample.camid for sample in data.gallery} == {1}
