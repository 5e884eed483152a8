# SPDX-License-Identifier: Apache-2.0
"""The Market-1501 family: three folders, the identity and the camera in the file name.

``PPPP_cC....jpg`` with an optionally signed pid; the camera has as many digits as it likes (MSMT17 converted: two,
VeRi-776: three). Market-1501, DukeMTMC-reID, PersonX, VeRi-776 and converted copies of MSMT17 and CUHK03 differ
only in folder names, in the cameras that exist and in what counts as junk.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset, Sample, relabel, small_pids, sort_samples
from fastreid_u.data.locate import list_files, shown

MARKET_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
VERI_FOLDERS = ("image_train", "image_query", "image_test")
MARKET_NAME = re.compile(r"(-?\d{1,300})_c(\d{1,300})")

# The 6-camera PersonX subset numbers its cameras as in the full simulator.
PERSONX_CAMERAS = {3: 0, 4: 1, 8: 2, 10: 3, 11: 4, 12: 5}


def one_based(num_cameras: int) -> dict[int, int]:
    """File-name cameras 1..num_cameras to 0..num_cameras-1."""
    return {camera: camera - 1 for camera in range(1, num_cameras + 1)}


def read_market_like(
    name: str,
    folder: Path,
    *,
    folders: Sequence[str] = MARKET_FOLDERS,
    cameras: Mapping[int, int] | None = None,
    max_pid: int | None = None,
) -> ReIDDataset:
    """Read three folders of ``PPPP_cC....jpg`` files.

    Args:
        name: name of the data set.
        folder: holds the three folders.
        folders: names of the train, query and gallery folders.
        cameras: file-name camera to 0-based camid; None numbers the cameras that occur in ascending order.
        max_pid: largest pid that can be right; None accepts any.

    Returns:
        Training pids relabelled; query and gallery pids as in the file names, if they fit 64 bits. Junk (pid -1) is
        never loaded; distractors (pid 0 of Market-1501) stay in the gallery as negatives.

    Raises:
        ValueError: a folder has no image named so, or a camera or pid that the set does not have.
    """
    parsed = [_parse_folder(name, folder / part) for part in folders]
    if cameras is None:
        cameras = {camera: i for i, camera in enumerate(sorted({row[2] for rows, _ in parsed for row in rows}))}
    splits, notes = [], []
    for part, (rows, about) in zip(folders, parsed, strict=True):
        for path, pid, camera in rows:
            if camera not in cameras:
                raise ValueError(f"{name}: camera must be one of {sorted(cameras)}, got {camera} in {shown(path)}")
            if max_pid is not None and pid > max_pid:
                raise ValueError(f"{name}: pid must be at most {max_pid}, got {pid} in {shown(path)}")
        splits.append(sort_samples(Sample(path, pid, cameras[camera]) for path, pid, camera in rows))
        notes += [f"{part}: {note}" for note in about]
    train, query, gallery = splits
    query, gallery = small_pids(query, gallery)
    return ReIDDataset(
        name=name,
        root=folder,
        train=relabel(train),
        query=query,
        gallery=gallery,
        has_cameras=len({sample.camid for samples in splits for sample in samples}) > 1,
        notes=tuple(notes),
    )


def _parse_folder(name: str, folder: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(path, pid, file-name camera) of each image that is not junk, and in words what was not read."""
    rows, skipped, deeper = [], 0, 0
    files = list_files(folder, recursive=True)
    for path in files.images:
        match = MARKET_NAME.match(os.path.basename(path))
        if os.path.dirname(path) != os.path.abspath(folder):
            deeper += 1
        elif match is None:
            skipped += 1
        elif int(match[1]) >= 0:  # -1 is junk: part of nobody's evaluation
            rows.append((path, int(match[1]), int(match[2])))
    if not rows:
        raise ValueError(
            f"{name}: {shown(folder)} must hold images named <pid>_c<camera>..., got {skipped} of other names"
            + (f" and {deeper} in sub-folders" if deeper else "")
        )
    notes = [f"{skipped} images skipped, their names are not <pid>_c<camera>..."] if skipped else []
    notes += [f"{deeper} images in sub-folders left out"] if deeper else []
    return rows, notes + files.notes()
