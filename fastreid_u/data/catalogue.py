# SPDX-License-Identifier: Apache-2.0
"""Known data sets: what their folders are called, who grants access, which reader fits; and ``load_dataset``."""

import difflib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreid_u.data.csv_list import read_csv
from fastreid_u.data.cuhk03 import CUHK03_LAYOUTS, read_cuhk03
from fastreid_u.data.dataset import ReIDDataset
from fastreid_u.data.folder import read_folder, read_unlabelled
from fastreid_u.data.locate import IMAGE_SUFFIXES, DatasetNotFound, find_layout, plain_name, shown
from fastreid_u.data.market import (
    MARKET_FOLDERS,
    PERSONX_CAMERAS,
    VERI_FOLDERS,
    one_based,
    read_market_like,
)
from fastreid_u.data.msmt17 import MSMT17_LAYOUTS, read_msmt17
from fastreid_u.data.same_file import with_shared_files_noted
from fastreid_u.data.vehicleid import VEHICLEID_LAYOUTS, read_vehicleid
from fastreid_u.data.vehiclex import VEHICLEX_LAYOUTS, read_vehiclex

ROOT_VARIABLE = "FASTREID_U_DATA"


@dataclass(frozen=True)
class KnownSet:
    """A data set that has a name.

    Attributes:
        folders: names under which its folder is met; the first is ours.
        layouts: alternatives of entries that the folder must hold.
        access: who hands out the data.
        read: from the folder and options to a data set.
        aliases: other names users type.
    """

    folders: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...]
    access: str
    read: Callable[..., ReIDDataset]
    aliases: tuple[str, ...] = ()


def _read_market1501(folder: Path) -> ReIDDataset:
    return read_market_like("market1501", folder, cameras=one_based(6), max_pid=1501)


def _read_dukemtmcreid(folder: Path) -> ReIDDataset:
    return read_market_like("dukemtmcreid", folder, cameras=one_based(8))


def _read_personx(folder: Path) -> ReIDDataset:
    return read_market_like("personx", folder, cameras=PERSONX_CAMERAS)


def _read_veri(folder: Path) -> ReIDDataset:
    folders = VERI_FOLDERS if (folder / VERI_FOLDERS[0]).is_dir() else MARKET_FOLDERS
    return read_market_like("veri", folder, folders=folders, cameras=one_based(20), max_pid=776)


KNOWN_SETS = {
    "market1501": KnownSet(
        folders=("market1501", "Market-1501-v15.09.15", "Market-1501", "market"),
        layouts=(MARKET_FOLDERS,),
        access="Market-1501 is handed out for research by its authors (Zheng et al., ICCV 2015) on their project page.",
        read=_read_market1501,
    ),
    "dukemtmcreid": KnownSet(
        folders=("dukemtmcreid", "DukeMTMC-reID", "dukemtmc", "duke"),
        layouts=(MARKET_FOLDERS,),
        access="DukeMTMC-reID was withdrawn by Duke University in 2019 and nobody grants access any more; "
        "it is neither fetched nor mirrored here, and a copy that exists is only read.",
        read=_read_dukemtmcreid,
    ),
    "msmt17": KnownSet(
        folders=("msmt17", "MSMT17_V1", "MSMT17_V2"),
        layouts=MSMT17_LAYOUTS,
        access="MSMT17 is released by its authors (Wei et al., CVPR 2018, Peking University) on a signed agreement.",
        read=read_msmt17,
        aliases=("msmt",),
    ),
    "cuhk03": KnownSet(
        folders=("cuhk03", "cuhk03-np", "cuhk03_np"),
        layouts=CUHK03_LAYOUTS,
        access="CUHK03 is handed out by the Chinese University of Hong Kong (Li et al., CVPR 2014) on request; "
        "the 767/700 split is from Zhong et al., CVPR 2017.",
        read=read_cuhk03,
    ),
    "personx": KnownSet(
        folders=("personx",),
        layouts=(MARKET_FOLDERS,),
        access="PersonX is published by its authors (Sun and Zheng, CVPR 2019); take the 6-camera subset.",
        read=_read_personx,
    ),
    "veri": KnownSet(
        folders=("veri", "VeRi", "VeRi-776", "VeRi_with_plate"),
        layouts=(VERI_FOLDERS, MARKET_FOLDERS),
        access="VeRi-776 is handed out by its authors (Liu et al., ECCV 2016) on request by e-mail.",
        read=_read_veri,
        aliases=("veri776",),
    ),
    "vehicleid": KnownSet(
        folders=("vehicleid", "VehicleID_V1.0", "PKU-VehicleID"),
        layouts=VEHICLEID_LAYOUTS,
        access="VehicleID is handed out by Peking University (Liu et al., CVPR 2016) on a signed agreement.",
        read=read_vehicleid,
    ),
    "vehiclex": KnownSet(
        folders=("vehiclex", "AIC20_ReID_Simulation", "AIC21_Track2_ReID_Simulation"),
        layouts=VEHICLEX_LAYOUTS,
        access="VehicleX comes with the AI City Challenge 2020, track 2 (Yao et al., ECCV 2020).",
        read=read_vehiclex,
    ),
    "luperson": KnownSet(
        folders=("luperson",),
        layouts=((),),
        access="LUPerson is handed out by its authors (Fu et al., CVPR 2021).",
        read=read_unlabelled,
    ),
}


def dataset_names() -> list[str]:
    """Names that ``load_dataset`` knows, besides any folder and any CSV file."""
    return sorted([*KNOWN_SETS, "synthetic"])


def known_name(name: str | os.PathLike) -> str | None:
    """Our name of a data set ("Market-1501", "market" and "MARKET1501" are market1501), None for anything else."""
    text = os.fspath(name)
    plain = "" if os.sep in text else plain_name(text)
    for known, entry in KNOWN_SETS.items():
        if plain in {plain_name(alias) for alias in (known, *entry.folders, *entry.aliases)}:
            return known
    return "synthetic" if plain == "synthetic" else None


def load_dataset(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ReIDDataset:
    """Read a data set from local files; nothing is downloaded and no image is opened.

    Args:
        name: one of ``dataset_names()`` (case and dashes do not matter), or the path of a folder of crops or of a
            CSV file; "synthetic" renders one.
        root: where to look: the data set's own folder or any folder above it that is named as usual. Default: the
            environment variable ``FASTREID_U_DATA``, then ``./data``.
        progress: called as ``progress(done, total)`` while "synthetic" is rendered, not when it is found rendered.
        options: of the reader (``test_size``, ``seed`` for VehicleID; ``variant`` for CUHK03; ``layout``,
            ``pattern`` for folders) or, for "synthetic", the fields of ``SyntheticConfig``.

    Returns:
        The data set; ``print(dataset.table())`` shows its size.

    Raises:
        DatasetNotFound: not there; the message names the places, and who grants access.
        ValueError: an unknown name, or files that contradict the layout.
        TypeError: a name that is no string or path, or an option that the reader does not have.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"load_dataset: name must be a name or a path, got {name!r}")
    text = os.fspath(name)
    if not text:
        raise ValueError("load_dataset: name must not be empty, got ''")
    known = known_name(text)
    if known == "synthetic":
        return _render(root, progress, options)
    if known is not None:
        entry = KNOWN_SETS[known]
        _check_options(known, entry.read, options)
        folder, _ = find_layout(known, data_root(root), entry.folders, entry.layouts, entry.access)
        return with_shared_files_noted(entry.read(folder, **options))
    for path in (Path(text).expanduser(), data_root(root) / text):
        if path.is_dir():
            _check_options(text, read_folder, options)
            return with_shared_files_noted(read_folder(path, **options))
        if path.is_file():
            if path.suffix.lower() in IMAGE_SUFFIXES:
                raise ValueError(f"load_dataset: name must be a folder or a CSV file, got the image {shown(path)}")
            _check_options(text, read_csv, options)
            return with_shared_files_noted(read_csv(path, **options))
    close = difflib.get_close_matches(plain_name(text), dataset_names(), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise DatasetNotFound(
        f"load_dataset: name must be one of {', '.join(dataset_names())}, or an existing folder or CSV file, "
        f"got {text!r}.{hint}"
    )


def data_root(root: str | os.PathLike | None) -> Path:
    """``root``, or the environment variable ``FASTREID_U_DATA``, or ``./data``."""
    return Path(root if root is not None else os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def _render(
    root: str | os.PathLike | None, progress: Callable[[int, int], None] | None, options: dict[str, Any]
) -> ReIDDataset:
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    _check_options("synthetic", SyntheticConfig, options)
    folder = generate(SyntheticConfig(**options), root, progress=progress)
    return read_market_like("synthetic", Path(folder))


def _check_options(name: str, reader: Callable[..., Any], options: dict[str, Any]) -> None:
    accepted = [p for p in inspect.signature(reader).parameters if p not in ("folder", "path")]
    for option in options:
        if option not in accepted:
            known = ", ".join(accepted) or "empty"
            raise TypeError(f"load_dataset: options of {name} must be among ({known}), got {option!r}")
