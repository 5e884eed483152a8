# SPDX-License-Identifier: Apache-2.0
"""Images that are in two of train, query and gallery: never a match of their own, and never trained on in silence."""

import io
import os
import shutil

import pytest
import torch

import fastreid_u
from fastreid_u.data import ReIDDataset, Sample, load_dataset
from fastreid_u.data.same_file import file_numbers
from fastreid_u.engine.arguments import Arguments, experiment_of
from fastreid_u.engine.datasets import load_datasets
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import test_split as split_of

SETTINGS = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, workers=0, iters=1, epochs=1, batch_size=16,
    num_instances=4, k1=8, k2=3, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def crops(tiny_world, tmp_path_factory):
    """A folder with training images and, as test/<n>.jpg, twelve images of four people."""
    folder = tmp_path_factory.mktemp("crops")
    shutil.copytree(tiny_world / "bounding_box_train", folder / "train")
    (folder / "test").mkdir()
    pids = []
    for number, source in enumerate(sorted((tiny_world / "query").iterdir())[:12]):
        shutil.copy(source, folder / f"test/{number}.jpg")
        pids.append(int(source.name.split("_")[0]))
    return folder, pids


def csv_of(folder, name, rows):
    """A CSV of (path, pid, split) rows: no cameras."""
    lines = [f"{path},{pid},{split}" for path, pid, split in rows]
    (folder / name).write_text("\n".join(["path,pid,split", *lines]) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def run(crops, tmp_path_factory):
    folder, pids = crops
    train = [(path.relative_to(folder), "", "train") for path in sorted((folder / "train").iterdir())]
    both = [(f"test/{n}.jpg", pid, split) for n, pid in enumerate(pids) for split in ("query", "gallery")]
    listed = csv_of(folder, "both.csv", train + both)
    return fastreid_u.train(listed, logs_dir=tmp_path_factory.mktemp("run") / "run", quiet=True, **SETTINGS)


def test_every_test_image_as_query_and_gallery_is_ranked_without_itself(run, crops, capsys):
    """Without cameras top-1 was 1.000 whatever the network; right is what the ranking without a split gives."""
    folder, pids = crops
    with_split = fastreid_u.evaluate(run.folder, device="cpu", workers=0)
    note = "note: 12 of 12 query images are in the gallery too; each is left out of its own ranking"
    assert capsys.readouterr().out.count(note) == 1
    assert (run.folder / "log.txt").read_text().count(note) == 1
    plain = csv_of(folder, "plain.csv", [(f"test/{n}.jpg", pid, "train") for n, pid in enumerate(pids)])
    without_split = fastreid_u.evaluate(run.folder, plain, device="cpu", workers=0, quiet=True)
    for name, value in without_split.items():
        assert with_split[name] == pytest.approx(value, abs=1e-6), name
        assert run.last[name] == with_split[name]
    assert with_split["top1"] < 1


def test_links_other_spellings_and_copies_are_the_same_image(run, crops, capsys):
    folder, pids = crops
    for other in ("linked", "hard", "again", "copied"):
        (folder / other).mkdir()
    (folder / "folder link").symlink_to("test")
    for n in range(len(pids)):
        (folder / f"linked/{n} other name.jpg").symlink_to(f"../test/{n}.jpg")
        os.link(folder / f"test/{n}.jpg", folder / f"hard/{n}.jpg")
        shutil.copy(folder / f"test/{n}.jpg", folder / f"copied/of {n}.jpg")
    expected = fastreid_u.evaluate(run.folder, device="cpu", workers=0, quiet=True)
    for spelling in (
        "linked/{} other name.jpg",
        "hard/{}.jpg",
        "folder link/{}.jpg",
        "again/../test/{}.jpg",
        "copied/of {}.jpg",
    ):
        rows = [(f"test/{n}.jpg", pid, "query") for n, pid in enumerate(pids)]
        rows += [(spelling.format(n), pid, "gallery") for n, pid in enumerate(pids)]
        listed = csv_of(folder, "spelled.csv", [("train/" + os.listdir(folder / "train")[0], "", "train"), *rows])
        found = fastreid_u.evaluate(run.folder, listed, device="cpu", workers=0)
        assert "note: 12 of 12 query images are in the gallery too" in capsys.readouterr().out
        assert found == pytest.approx(expected, abs=1e-6), spelling


def test_copies_of_an_image_in_the_gallery_are_legal(run, crops, capsys):
    """Only the query's own file is left out, and with it all its entries; nothing is said of the rest."""
    folder, pids = crops
    first = ("train/" + os.listdir(folder / "train")[0], "", "train")
    rows = [(f"test/{n}.jpg", pid, "query") for n, pid in enumerate(pids[:6])]
    rows += 2 * [(f"test/{n}.jpg", pid, "gallery") for n, pid in enumerate(pids) if n >= 6]
    rows.append(("train/" + sorted(os.listdir(folder / "train"))[1], pids[0], "gallery"))
    fastreid_u.evaluate(run.folder, csv_of(folder, "copies.csv", [first, *rows]), device="cpu", workers=0)
    assert "note" not in capsys.readouterr().out


def test_images_that_are_trained_on_and_ranked_are_remarked(run, crops, tmp_path, capsys):
    folder, pids = crops
    train = [(path.relative_to(folder), "", "train") for path in sorted((folder / "train").iterdir())]
    test = [(f"test/{n}.jpg", pid, "query" if n % 2 else "gallery") for n, pid in enumerate(pids)]
    leak = [(f"./test/{n}.jpg", "", "train") for n in range(5)]
    listed = csv_of(folder, "leak.csv", train + test + leak)
    note = f"5 of {len(train) + 5} training images are in query or gallery too: the figures flatter the network"
    data = load_dataset(listed)
    assert data.notes == (note,)
    ready = ReIDDataset("ready", folder, data.train, data.query, data.gallery, has_pids=False, has_cameras=False)
    for given in (listed, data, ready):
        fastreid_u.evaluate(run.folder, given, device="cpu", workers=0)
        assert capsys.readouterr().out.count(f"note: {note}") == 1
    fastreid_u.train(ready, logs_dir=tmp_path / "run", **SETTINGS)
    assert capsys.readouterr().out.count(f"note: {note}") == 1


def test_files_that_are_not_there_are_told_apart_by_their_path(tmp_path):
    numbers = file_numbers([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"), str(tmp_path / "x/../a.jpg")])
    assert numbers == [0, 1, 0]
    split = ReIDDataset("gone", tmp_path, (), (Sample("/gone/1.jpg", 1, 0),), (Sample("/gone/1.jpg", 1, 0),))
    display = Display(stream=io.StringIO())
    assert torch.equal(split_of(split, display).files, torch.tensor([0, 0]))
    assert "1 of 1 query images" in display.stream.getvalue()


def test_a_labelled_source_that_holds_images_of_the_test_is_remarked(crops):
    """And refused where it holds an image to learn, under whatever path."""
    folder, pids = crops
    train = [(path.relative_to(folder), "", "train") for path in sorted((folder / "train").iterdir())]
    test = [(f"test/{n}.jpg", pid, "query" if n % 2 else "gallery") for n, pid in enumerate(pids)]
    target = csv_of(folder, "target.csv", train + test)
    (folder / "other").symlink_to("test")
    source = csv_of(folder, "source.csv", [(f"other/{n}.jpg", pid, "train") for n, pid in enumerate(pids)])
    display = Display(quiet=True)

    def datasets(source):
        given = Arguments(target, "cluster_contrast_uda", None, None, None, {"source": str(source)})
        return load_datasets(experiment_of(given), display)

    note = "12 of 12 labelled source images are in query or gallery too: the figures flatter the network"
    assert note in datasets(source).target.notes
    (folder / "train link").symlink_to("train")
    same = csv_of(folder, "same.csv", [(f"train link/{train[0][0].name}", 1, "train")])
    with pytest.raises(ValueError, match="train: source must hold other images than the set to learn"):
        datasets(same)
