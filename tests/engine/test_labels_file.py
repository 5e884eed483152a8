# SPDX-License-Identifier: Apache-2.0
"""``labels.csv`` names the cluster of each training image, whatever the image's name is made of."""

import csv

import numpy as np
import pytest
from PIL import Image

import fastreid_u
from fastreid_u.data import Sample, load_dataset
from fastreid_u.engine.checkpoint import SaveError
from fastreid_u.engine.labels_file import write_labels


def read(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_paths_survive_whatever_they_hold(tmp_path):
    names = ["a,b.jpg", 'say "hi".jpg', "two\nlines.jpg", "cr\rlf\r\n.jpg", "é.jpg", "byte\udce9.jpg", " = 1", "'"]
    samples = [Sample(f"/data/{name}", -1, place) for place, name in enumerate(names)]
    labels = np.array([0, -1, 1, 1, 0, -1, 2, 3])
    write_labels(tmp_path / "labels.csv", samples, labels)
    assert [(row["path"], int(row["label"]), int(row["camid"])) for row in read(tmp_path / "labels.csv")] == [
        (sample.path, label, sample.camid) for sample, label in zip(samples, labels.tolist(), strict=True)
    ]


def test_a_file_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "labels.csv"
    write_labels(path, [Sample("a", -1, 0)], np.array([5]))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastreid_u.engine.checkpoint.os.fsync", full)
    with pytest.raises(SaveError, match=r"cannot write .*labels.csv: No space left"):
        write_labels(path, [Sample("a", -1, 0)], np.array([6]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_epoch_replaces_it_with_its_own_labels(smoke, monkeypatch):
    from fastreid_u.labels.generator import LabelGenerator

    given, real = [], LabelGenerator.forward

    def noted(self, features, epoch):
        given.append(real(self, features, epoch))
        return given[-1]

    monkeypatch.setattr(LabelGenerator, "forward", noted)
    run = smoke("cluster_contrast", epochs=1)
    assert [int(row["label"]) for row in read(run.folder / "labels.csv")] == given[-1].tolist()
    run = smoke("cluster_contrast", resume=True, epochs=2)
    rows = read(run.folder / "labels.csv")
    assert [int(row["label"]) for row in rows] == given[-1].tolist()
    assert len(given) == 2
    assert run.last["clusters"] == len({row["label"] for row in rows} - {"-1"})
    assert {row["camid"] for row in rows} == {"0", "1", "2"}


def test_an_unreadable_image_has_its_line(tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    broken = tmp_path / "bro,ken.jpg"
    broken.write_bytes(b"no image")
    whole = tmp_path / "whole.jpg"
    Image.new("RGB", (32, 64), (90, 60, 30)).save(whole)
    import dataclasses

    more = (*dataset.train, Sample(str(broken), -1, 1), Sample(str(whole), -1, 1))
    run = fastreid_u.train(
        dataclasses.replace(dataset, train=more), logs_dir=tmp_path / "run", epochs=1, iters=1, height=64, width=32,
        arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, workers=0, k1=8, k2=3, quiet=True,
        device="cpu",
    )  # fmt: skip
    rows = read(run.folder / "labels.csv")
    assert len(rows) == len(more)
    assert rows[-2] == {"path": str(broken), "label": "-1", "camid": "1"}
