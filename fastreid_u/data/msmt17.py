# SPDX-License-Identifier: Apache-2.0
"""MSMT17 in the three layouts that exist: official lists (V1, V2) and folders converted to Market-1501 names."""

import os
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset, Sample, relabel, sort_samples
from fastreid_u.data.locate import DatasetNotFound, shown
from fastreid_u.data.market import MARKET_FOLDERS, one_based, read_market_like

_LISTS = ("list_train.txt", "list_query.txt", "list_gallery.txt")
_V1_FOLDERS = ("train", "test")
_V2_FOLDERS = ("mask_train_v2", "mask_test_v2")  # faces masked
_CAMERAS = one_based(15)

MSMT17_LAYOUTS = ((*_V1_FOLDERS, *_LISTS), (*_V2_FOLDERS, *_LISTS), MARKET_FOLDERS)


def read_msmt17(folder: Path) -> ReIDDataset:
    """Read ``folder``, whose layout is one of ``MSMT17_LAYOUTS``.

    Training images are those of list_train and list_val together, as in every published unsupervised run. The pids
    of train (0-1040) and test (0-3059) are separate numberings.

    Raises:
        ValueError: a line or a file name that does not fit, or a list without images.
        DatasetNotFound: the lists name images that are not in the image folders.
    """
    if all((folder / part).is_dir() for part in MARKET_FOLDERS):
        return read_market_like("msmt17", folder, cameras=_CAMERAS)
    train_dir, test_dir = _V1_FOLDERS if (folder / _V1_FOLDERS[0]).is_dir() else _V2_FOLDERS
    train = _read_list(folder, train_dir, "list_train.txt")
    notes = ()
    if (folder / "list_val.txt").is_file():
        train += _read_list(folder, train_dir, "list_val.txt")
    else:
        notes = ("list_val.txt is missing: its 2,373 images are not trained on",)
    return ReIDDataset(
        name="msmt17",
        root=folder,
        train=relabel(sort_samples(train)),
        query=sort_samples(_read_list(folder, test_dir, "list_query.txt")),
        gallery=sort_samples(_read_list(folder, test_dir, "list_gallery.txt")),
        notes=notes,
    )


def _read_list(folder: Path, images: str, name: str) -> list[Sample]:
    """Lines ``0000/0000_000_01_0303morning_0015_0.jpg 0``; the third number of the file name is the camera, from 1."""
    base = os.path.join(os.path.abspath(folder), images)
    samples = []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            path, pid = line.rsplit(maxsplit=1)
            camera = int(path.rsplit("/", 1)[-1].split("_")[2])
            samples.append(Sample(os.path.join(base, path), int(pid), _CAMERAS[camera]))
        except (ValueError, IndexError, KeyError) as error:
            rule = "<pid>/<pid>_<sequence>_<camera 1-15>_... <pid>"
            raise ValueError(f"msmt17: {name} line {number} must read {rule}, got {line!r}") from error
    if not samples:
        raise ValueError(f"msmt17: {shown(folder / name)} must list images, got none")
    if not os.path.exists(samples[0].path):
        raise DatasetNotFound(
            f"msmt17: {shown(folder / name)} must list images under {images}/, got {shown(samples[0].path)}"
        )
    return samples
