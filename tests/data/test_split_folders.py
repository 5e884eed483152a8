# SPDX-License-Identifier: Apache-2.0
"""Folders called like the parts of a data set: no test image is trained on, and no part left out, without a word."""

import shutil

import pytest

from fastreid_u.data import load_dataset
from fastreid_u.data.split_folders import part_of

BY_ID = "one sub-folder for each identity"
MARKET_NAMES = "names <pid>_c<camera>"
NEITHER = "it is neither trained on nor ranked"


def people(folder, *pids, name="a.jpg"):
    """An image of each identity in sub-folders of ``folder``."""
    return [f"{folder}/{pid}/{name}" for pid in pids]


# What lies in the folder; images of train, query and gallery; notes.
LAYOUTS = {
    "capitals": (
        ["Train/1_c1.jpg", "Query/2_c1.jpg", "Gallery/2_c2.jpg"],
        (1, 1, 1),
        [
            *(f"{part}: {MARKET_NAMES}" for part in ("Train", "Query", "Gallery")),
            "training images are of one camera only: training does without cameras",
        ],
    ),
    "other words": (
        [*people("training", 1, 2), *people("probe", 3, 4), *people("Galleries", 3, 4, 5)],
        (2, 2, 3),
        [f"training (train): {BY_ID}", f"probe (query): {BY_ID}", f"Galleries (gallery): {BY_ID}"],
    ),
    "query and gallery alone are for a network that is trained": (
        [*people("query", 3, 4), *people("gallery", 3, 4, 5)],
        (0, 2, 3),
        [f"query: {BY_ID}", f"gallery: {BY_ID}"],
    ),
    "test beside query is the gallery": (
        [*people("train", 1, 2), *people("test", 3, 4, 5), *people("query", 3, 4)],
        (2, 2, 3),
        [f"train: {BY_ID}", f"query: {BY_ID}", f"test (gallery): {BY_ID}"],
    ),
    "test beside query and gallery": (
        [*people("train", 1, 2), *people("test", 3), *people("query", 3, 4), *people("gallery", 3, 4)],
        (2, 2, 2),
        [
            *(f"{part}: {BY_ID}" for part in ("train", "query", "gallery")),
            "test: 1 images left out, gallery is the gallery",
        ],
    ),
    "train and test, the commonest of all": (
        [*people("train", 1, 2), *people("test", 1, 2, 3)],
        (2, 0, 0),
        [f"train: {BY_ID}", "test: 3 images left out, it is the gallery only where there is a query folder"],
    ),
    "train and val": (
        [*people("train", 1, 2), *people("val", 3)],
        (2, 0, 0),
        [f"train: {BY_ID}", f"val: 1 images left out, {NEITHER}"],
    ),
    "query without gallery": (
        [*people("train", 1, 2), *people("query", 3, 4)],
        (2, 2, 0),
        [f"train: {BY_ID}", f"query: {BY_ID}", "query: 2 images, but no gallery: they are not ranked"],
    ),
    "gallery without query": (
        [*people("train", 1, 2), *people("gallery", 3, 4)],
        (2, 0, 2),
        [f"train: {BY_ID}", f"gallery: {BY_ID}", "gallery: 2 images, but no query: they are not ranked"],
    ),
    "a benchmark prepared for training by class": (
        [*people("train", 1, 2), *people("val", 1, 2), *people("train", 1, 2, name="b.jpg")]
        + [path for pid in (1, 2) for path in (f"train_all/{pid}/{i}.jpg" for i in range(3))]
        + [*people("query", 3, 4), *people("gallery", 3, 4)],
        (4, 2, 2),
        [
            *(f"{part}: {BY_ID}" for part in ("train", "query", "gallery")),
            "train_all: 6 images left out, train is used",
            f"val: 2 images left out, {NEITHER}",
        ],
    ),
    "train and val as one folder": (
        [*people("trainval", 1, 2), *people("val", 1)],
        (2, 0, 0),
        [f"trainval (train): {BY_ID}", f"val: 1 images left out, {NEITHER}"],
    ),
    "one part in two spellings": (
        [*people("train", 1, 2), *people("Train", 1, 2, 3)],
        (2, 0, 0),
        [f"train: {BY_ID}", "Train: 3 images left out, train is used"],
    ),
    "folders of VeRi-776 with junk": (
        [
            "image_train/1_c1.jpg",
            "image_train/2_c2.jpg",
            "image_query/3_c1.jpg",
            "image_test/3_c2.jpg",
            "image_test/-1_c2.jpg",
        ],
        (2, 1, 1),
        [
            f"image_train (train): {MARKET_NAMES}",
            f"image_query (query): {MARKET_NAMES}",
            f"image_test (gallery): {MARKET_NAMES}",
            "gallery: 1 images left out as junk, their identity is negative",
        ],
    ),
    "folders of Market-1501 in capitals, with more beside them": (
        ["Bounding_Box_Train/1_c1.jpg", "QUERY/2_c1.jpg", "bounding_box_TEST/2_c2.jpg", "gt_bbox/1_c1.jpg"],
        (1, 1, 1),
        ["gt_bbox: 1 images left out, no part of the split is called so"],
    ),
    "images and folders beside the split": (
        [*people("train", 1, 2), "a.jpg", "x/1.jpg", "y/2.jpg", "z/1.jpg", "w/1.jpg", "notes/about.txt"],
        (2, 0, 0),
        [
            f"train: {BY_ID}",
            "w, x, y and 1 more: 4 images left out, no part of the split is called so",
            "1 images left out, they lie beside the folders of the split",
        ],
    ),
    "a folder of a part without images": (
        [*people("ann", 1), *people("tom", 1), "test/labels.txt"],
        (2, 0, 0),
        ["folder: no labels"],
    ),
}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("train", "train TRAIN Training train_all trainval bounding_box_train Train-Images mask_train_v2 train2017"),
        ("val", "val Valid validation val2017 images_val"),
        ("query", "query Queries probe image_query"),
        ("gallery", "gallery Galleries gallery_images"),
        ("test", "test testing bounding_box_test image_test mask_test_v2 bbox_test test_set"),
        (
            None,
            "12 tom crops images c1 latest contest trainer train1 trained valerie value tester unlabeled query_by_tom",
        ),
    ],
)
def test_what_a_folder_is_called(part, names):
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_used_and_what_is_left_out(plant, layout):
    files, counts, notes = LAYOUTS[layout]
    data = load_dataset(plant("crops", *files))
    assert tuple(map(len, (data.train, data.query, data.gallery))) == counts
    assert list(data.notes) == notes


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["test/1/a.jpg", "test/2/a.jpg"], "test/"),
        (["val/1/a.jpg", "test/2/a.jpg"], "test/, val/"),
        (["query/1/a.jpg"], "query/"),
        (["Gallery/1/a.jpg"], "Gallery/"),
        (["tom/1.jpg", "ann/1.jpg", "test/1.jpg"], "test/"),
        (["a.jpg", "b.jpg", "probe/1.jpg"], "probe/"),
        (["pytorch/train/1/a.jpg", "pytorch/query/2/a.jpg"], "pytorch/query/, pytorch/train/"),
        (["mine/train/a.jpg", "mine/test/a.jpg", "yours/train/a.jpg"], "mine/test/, mine/train/"),
        (["images/train/a.jpg", "images/val/b.jpg"], "images/train/, images/val/"),
        (["tom/train/a.jpg", "ann/test/a.jpg"], "ann/test/, tom/train/"),
    ],
)
def test_what_looks_like_a_split_and_is_none_is_refused(plant, files, named):
    folder = plant("crops", *files)
    with pytest.raises(ValueError, match=rf"crops must hold crops to train on, .* got {named}, .*layout= or pattern="):
        load_dataset(folder)
    for way_out in ({"layout": "flat"}, {"pattern": r"(?P<pid>.)\.jpg$"}):
        data = load_dataset(folder, **way_out)
        assert len(data.train) == len(files)
        assert f"{named}: trained on as well, though called like parts of a split" in data.notes


def test_a_split_inside_the_training_folder_is_refused(plant):
    folder = plant("crops", "train/train/1.jpg", "train/test/2.jpg", "val/3.jpg")
    with pytest.raises(ValueError, match=r"crops/train must hold crops to train on, .* got test/, train/, .*layout="):
        load_dataset(folder)
    assert len(load_dataset(folder, layout="flat").train) == 2
    plant("crops2", "train/ann/1.jpg", "train/test/2.jpg")
    assert load_dataset(folder.with_name("crops2")).has_pids, "one of them alone may be anything"


def test_one_folder_deeper_called_like_a_part_is_no_split(plant):
    """A person may be called Val, and a shard test."""
    data = load_dataset(plant("crops", "a/val/1.jpg", "a/tom/1.jpg", "b/tom/2.jpg"))
    assert (len(data.train), data.notes) == (3, ("folder: no labels",))


@pytest.mark.parametrize("option", [{"layout": "by-identity"}, {"pattern": r"^(?P<pid>\d+)/"}])
def test_options_for_labels_keep_the_split(plant, option):
    data = load_dataset(plant("crops", "Train/1/a.jpg", "Query/2/a.jpg", "Gallery/2/b.jpg"), **option)
    assert tuple(map(len, (data.train, data.query, data.gallery))) == (1, 1, 1)


def test_links_beside_the_split(plant):
    folder = plant("crops", *people("train", 1, 2), *people("elsewhere", 3))
    (folder / "test").symlink_to(folder / "elsewhere")
    (folder / "query").symlink_to("query")  # to itself: no folder
    data = load_dataset(folder)
    assert (len(data.train), len(data.query)) == (2, 0)
    assert data.notes[1].startswith("test: 1 images left out")


def test_training_folder_without_images(plant):
    folder = plant("crops", "Train/readme.txt", "query/1/a.jpg", "gallery/1/b.jpg")
    with pytest.raises(ValueError, match="Train must hold images, got none"):
        load_dataset(folder, layout="by-identity")
    shutil.rmtree(folder / "Train")
    assert load_dataset(folder, layout="by-identity").train == ()
