# SPDX-License-Identifier: Apache-2.0
"""Labels as people and table programs write them: one number however written, gaps, ids of any length."""

import pytest

from fastreid_u.data import ReIDDataset, load_dataset
from fastreid_u.data.label_text import is_gap, numbering, whole_number

HUGE = 10**20


@pytest.fixture
def listed(plant, tmp_path):
    """``listed(header, *rows)`` reads a list whose n-th row (or more of one) is about image n."""

    def read(header, *rows):
        plant("", *(f"{i}.jpg" for i in range(len(rows))))
        lines = [f"path,{header}", *(f"{i}.jpg,{row}" for i, row in enumerate(rows))]
        (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
        return load_dataset(tmp_path / "list.csv")

    return read


class TestNumbers:
    @pytest.mark.parametrize("column", ["pid", "camid"])
    @pytest.mark.parametrize(
        ("cells", "numbers"),
        [
            (["0", "0.0", "1"], [0, 0, 1]),
            (["3", "3.0", "003", "+3", "3."], [0, 0, 0, 0, 0]),
            (["1000", "1e3", "1E+03", '"1,000"', " 7 "], [1, 1, 1, 1, 0]),
            (["0", "0.0", "lobby"], [0, 0, 1]),
            (["1e3", "1000", "a1"], [1, 0, 2]),  # hash-like ids: in a column of text no exponent is meant
            (["2.5", "10", "2.50"], [1, 0, 2]),
            ([str(HUGE + 1), str(HUGE)], [1, 0]),
        ],
    )
    def test_whole_numbers_written_in_two_ways_are_one(self, listed, column, cells, numbers):
        data = listed(column, *cells)
        known = [sample.pid if column == "pid" else sample.camid for sample in data.train]
        assert known == (numbers if column == "pid" or len(set(numbers)) > 1 else [0] * len(cells))

    def test_in_query_and_gallery(self, listed):
        data = listed("pid,camid,split", "3,0,train", "5,1,query", "5.0,0.0,gallery", "05,1.0,gallery")
        assert [sample.pid for sample in data.query + data.gallery] == [5, 5, 5]
        assert [sample.camid for sample in data.query + data.gallery] == [1, 0, 1]

    def test_in_folders(self, plant):
        data = load_dataset(plant("crops", "3/a.jpg", "3.0/b.jpg", "nan/c.jpg"))
        assert [sample.pid for sample in data.train] == [0, 0, -1]

    @pytest.mark.parametrize("text", ["9" * 5000, "1e99999999", "--3", "1_000", "-", "+", ".0", "1.5", "1,00", "0x7"])
    def test_what_is_no_number_is_text(self, text):
        assert whole_number(text) is None
        assert numbering([text, "x"]) == {text: int(text > "x"), "x": int(text < "x")}

    def test_shortened_by_a_table_program(self, listed):
        data = listed("pid", "1.23457E+14", "1.23457E+14", "7")
        assert [sample.pid for sample in data.train] == [1, 1, 0]
        assert data.notes == (
            "identity of 2 images: table programs shorten long numbers, as in 1.23457E+14, and may have merged some",
        )


class TestGaps:
    @pytest.mark.parametrize("mark", ["nan", "NaN", "None", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaT"])
    def test_marks_of_a_missing_value_are_empty(self, listed, mark):
        data = listed(
            "pid,camid,split", f"{mark},1,{mark}", f"{mark},2,train", f"8,{mark},", "8,1,query", "8,2,gallery"
        )
        assert [sample.pid for sample in data.train] == [-1, -1, 0]
        assert f"identity of 2 images: {mark} count as empty" in data.notes
        assert f"camera of 1 images: {mark} count as empty" in data.notes
        assert "2 images without a split are training images" in data.notes

    def test_several_marks_are_counted_together(self, listed):
        data = listed("pid", "nan", "None", "nan", "", "4")
        assert data.notes == (
            "identity of 3 images: None, nan count as empty",
            "4 of 5 training images have no identity: they do not count in ARI, NMI and ids",
        )

    @pytest.mark.parametrize("name", ["Na", "Nan Goldin", "no", "0", "north", "unknown"])
    def test_names_are_not_marks(self, name):
        assert not is_gap(name)

    def test_a_gap_in_query_or_gallery_is_no_identity(self, listed):
        with pytest.raises(ValueError, match="query and gallery images must have an identity, got none"):
            listed("pid,split", "1,train", "nan,query", "1,gallery")

    @pytest.mark.parametrize("minus", ["-1", "-1.0", "-2", " -3"])
    def test_a_negative_identity_is_unknown_in_training_and_junk_in_the_test(self, listed, minus):
        data = listed("pid,split", f"{minus},train", "4,train", "5,query", "5,gallery", f"{minus},gallery")
        assert [sample.pid for sample in data.train] == [-1, 0]
        assert (len(data.query), len(data.gallery)) == (1, 1)
        assert "gallery: 1 images left out as junk, their identity is negative" in data.notes

    def test_a_negative_camera_is_unknown(self, listed):
        data = listed("camid", "1", "2", "-1")
        assert not data.has_train_cameras
        assert data.notes == (
            "camera of 1 images: negative numbers count as empty",
            "1 images have no camera: cameras are not used",
        )


class TestIdsOfAnyLength:
    def test_in_a_list(self, check, listed):
        """They are numbered as those of training are, the same in query and gallery."""
        rows = [f"{HUGE + i},{HUGE + i % 2},{split}" for i, split in enumerate(["train", "train", "query", "query"])]
        data = check(listed("pid,camid,split", *rows, f"{HUGE + 3},{HUGE},gallery", f"{HUGE + 2}.0,{HUGE + 1},gallery"))
        assert [sample.pid for sample in data.train] == [0, 1]
        assert [sample.pid for sample in data.query] == [0, 1]
        assert [sample.pid for sample in data.gallery] == [1, 0]
        assert [sample.camid for sample in data.gallery] == [0, 1]

    def test_in_names(self, check, plant_market, plant):
        plant_market("mine", ["1_c1.jpg"], [f"{HUGE}_c1.jpg", "7_c1.jpg"], [f"{HUGE}_c2.jpg", "0_c2.jpg", "7_c2.jpg"])
        data = check(load_dataset(plant("mine")))
        assert sorted(sample.pid for sample in data.query) == [1, 2]
        assert {sample.pid for sample in data.gallery} == {0, 1, 2}

    def test_that_fit_stay_as_they_are(self, listed):
        data = listed("pid,split", "1,train", f"{2**63 - 1},query", f"{2**63 - 1},gallery")
        assert data.query[0].pid == 2**63 - 1

    @pytest.mark.parametrize("field", ["pid", "camid"])
    def test_in_a_ready_data_set_are_refused(self, listed, field):
        sample = listed("pid", "1").train[0]._replace(**{field: HUGE})
        with pytest.raises(
            ValueError, match=rf"ReIDDataset: {field} must be an integer of 64 bits, got {HUGE} for .*0.jpg"
        ):
            ReIDDataset("mine", None, (sample,))
