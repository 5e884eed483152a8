# SPDX-License-Identifier: Apache-2.0
"""VehicleX, the simulated vehicles of the AI City Challenge: training images only, used as a source domain."""

import os
from pathlib import Path
from xml.etree import ElementTree

from fastreid_u.data.dataset import ReIDDataset
from fastreid_u.data.locate import list_files, shown
from fastreid_u.data.market import MARKET_NAME
from fastreid_u.data.rows import Row, from_rows

_IMAGE_FOLDERS = ("image_train", "sys_image_train")

VEHICLEX_LAYOUTS = tuple((folder,) for folder in _IMAGE_FOLDERS)


def read_vehiclex(folder: Path) -> ReIDDataset:
    """Read ``image_train/`` (2020) or ``sys_image_train/`` (2021).

    Identity and camera come from the names ``PPPP_cCCC_...``, and from ``train_label.xml`` where names say nothing.
    The simulator's cameras, from 6 to 36 with gaps, become 0..n-1.

    Raises:
        ValueError: neither names nor the XML file label every image.
    """
    present = [part for part in _IMAGE_FOLDERS if (folder / part).is_dir()]
    images = folder / present[0]
    files = list_files(images)
    paths = files.images
    rows: list[Row] = []
    for path in paths:
        if match := MARKET_NAME.match(os.path.basename(path)):
            rows.append(Row(path, match[1], match[2]))
    if len(rows) < len(paths):
        rows = _from_xml(folder / "train_label.xml", paths)
    if not rows:
        raise ValueError(f"vehiclex: {shown(images)} must hold images, got none")
    notes = [f"{part}: left out, {present[0]} is used" for part in present[1:]]
    return from_rows("vehiclex", folder, rows, [], [], notes=[*notes, *files.notes(present[0])])


def _from_xml(file: Path, paths: list[str]) -> list[Row]:
    """``<Item imageName="000001.jpg" vehicleID="0001" cameraID="c006" .../>`` for each image."""
    if not file.is_file():
        raise ValueError(
            f"vehiclex: images must be named <pid>_c<camera>... or listed in train_label.xml, got {shown(paths[0])}"
        )
    # Parsed from text: the files declare gb2312, which the XML parser does not know, and hold plain ASCII.
    text = file.read_text(encoding="utf-8", errors="replace")
    root = ElementTree.fromstring(text[text.index("?>") + 2 :] if text.lstrip().startswith("<?xml") else text)
    labels = {item.get("imageName"): (item.get("vehicleID"), item.get("cameraID")) for item in root.iter("Item")}
    rows: list[Row] = []
    for path in paths:
        pid, camera = labels.get(os.path.basename(path), (None, None))
        if pid is None or camera is None:
            raise ValueError(f"vehiclex: {shown(file)} must label every image, got none for {shown(path)}")
        rows.append(Row(path, pid, camera.lstrip("c")))
    return rows
