# SPDX-License-Identifier: Apache-2.0
"""VehicleX, the simulated vehicles of the AI City Challenge: training images only, used as a source domain."""

import os
from pathlib import Path
from xml.etree import ElementTree

from fastreid_u.data.dataset import ReIDDataset, Row, from_rows
from fastreid_u.data.locate import list_images
from fastreid_u.data.market import MARKET_NAME

_IMAGE_FOLDERS = ("image_train", "sys_image_train")

VEHICLEX_LAYOUTS = tuple((folder,) for folder in _IMAGE_FOLDERS)


def read_vehiclex(folder: Path) -> ReIDDataset:
    """Read ``image_train/`` (2020) or ``sys_image_train/`` (2021).

    Identity and camera come from the names ``PPPP_cCCC_...``, and from ``train_label.xml`` where names say nothing.
    The simulator's cameras, from 6 to 36 with gaps, become 0..n-1.

    Raises:
        ValueError: neither names nor the XML file label every image.
    """
    images = next(folder / part for part in _IMAGE_FOLDERS if (folder / part).is_dir())
    paths = list_images(images)
    rows: list[Row] = []
    for path in paths:
        if match := MARKET_NAME.match(os.path.basename(path)):
            rows.append((path, match[1], match[2]))
    if len(rows) < len(paths):
        rows = _from_xml(folder / "train_label.xml", paths)
    if not rows:
        raise ValueError(f"vehiclex: {images} must hold images, got none")
    return from_rows("vehiclex", folder, rows, [], [])


def _from_xml(file: Path, paths: list[str]) -> list[Row]:
    """``<Item imageName="000001.jpg" vehicleID="0001" cameraID="c006" .../>`` for each image."""
    if not file.is_file():
        raise ValueError(
            f"vehiclex: images must be named <pid>_c<camera>... or listed in train_label.xml, got {paths[0]}"
        )
    # Parsed from text: the files declare gb2312, which the XML parser does not know, and hold plain ASCII.
    text = file.read_text(encoding="utf-8", errors="replace")
    root = ElementTree.fromstring(text[text.index("?>") + 2 :] if text.lstrip().startswith("<?xml") else text)
    labels = {item.get("imageName"): (item.get("vehicleID"), item.get("cameraID")) for item in root.iter("Item")}
    rows: list[Row] = []
    for path in paths:
        pid, camera = labels.get(os.path.basename(path), (None, None))
        if pid is None or camera is None:
            raise ValueError(f"vehiclex: {file} must label every image, got none for {path}")
        rows.append((path, pid, camera.lstrip("c")))
    return rows
