# SPDX-License-Identifier: Apache-2.0
"""Ranking quality of a network on a data set's query and gallery."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastreid_u.engine.device import Machine
from fastreid_u.engine.display import Display
from fastreid_u.engine.image_set import ImageSet, Reading
from fastreid_u.ops.rank_metrics import rank_metrics
from fastreid_u.ops.rerank import rerank

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset, Sample


@dataclass(frozen=True)
class Split:
    """Images to rank, and how.

    Attributes:
        samples, queries: the first ``queries`` of ``samples`` against the rest, or all against all when it is None.
        has_cameras: leave images of the query's identity and camera out.
        style: re-rank by this rule of ``rerank``; None ranks by the features' own distance.
    """

    samples: "tuple[Sample, ...]"
    queries: int | None
    has_cameras: bool
    style: str | None = None

    @cached_property
    def files(self) -> Tensor:
        """(N,) numbers of the files, the same where two samples are one file.

        A query and a gallery without cameras, which would leave out what was taken at the same moment, count copies of
        a file as that file.
        """
        from fastreid_u.data.same_file import file_numbers, image_numbers

        copies = self.queries is not None and not self.has_cameras
        numbers = (image_numbers if copies else file_numbers)([sample.path for sample in self.samples])
        return torch.tensor(numbers, device="cpu")

    @property
    def pids(self) -> Tensor:
        return torch.tensor([sample.pid for sample in self.samples], device="cpu")

    @property
    def camids(self) -> Tensor:
        return torch.tensor([sample.camid for sample in self.samples], device="cpu")

    @property
    def place(self) -> str:
        """What the ranking is measured on, for cards and curves: "on the ..."."""
        return "test split" if self.queries is not None else "training images themselves"


class SplitImages(ImageSet):
    """The images of ``split``, to be ranked."""

    def __init__(self, split: Split, reading: Reading, machine: Machine) -> None:
        super().__init__(split.samples, reading, machine)
        self.split = split


def test_split(dataset: "ReIDDataset", display: Display, ignore_cameras: bool = False) -> Split | None:  # noqa: PT028
    """What can be ranked, with a warning where it is less than a query and a gallery with cameras; None = nothing.

    With ``ignore_cameras`` images of the query's own camera are ranked too.
    """
    ranked = dataset.query and dataset.gallery
    cameras = dataset.has_test_cameras if ranked else dataset.has_train_cameras
    if cameras and ignore_cameras:
        cameras = False
        display.line("note: cameras are ignored in the ranking, which published figures do not do")
    if ranked:
        if not dataset.has_test_cameras:
            display.line(
                "warning: no camera ids for all of query and gallery, or one camera only: images of the query's own "
                "camera cannot be left out of its ranking"
            )
        split = Split(dataset.query + dataset.gallery, len(dataset.query), cameras)
        queries, gallery = split.files[: split.queries], split.files[split.queries :]
        shared = int(torch.isin(queries, gallery).sum())
        if shared:
            display.line(
                f"note: {shared} of {len(queries)} query images are in the gallery too; each is left out of its own "
                "ranking"
            )
        return split
    if dataset.query or dataset.gallery:
        there, missing = ("query", "gallery") if dataset.query else ("gallery", "query")
        display.line(f"warning: {there} images but no {missing}: they are not ranked")
    named = tuple(sample for sample in dataset.train if sample.pid >= 0) if dataset.has_pids else ()
    if named:
        display.line(
            "warning: no query/gallery split: the training images with known identities are ranked against each "
            "other, which flatters the network"
        )
        return Split(named, None, cameras)
    display.line("warning: no query/gallery split and no identities: nothing to evaluate; labels are still reported")
    return None


def evaluate_split(model: nn.Module, images: SplitImages, ap: str) -> dict[str, Any]:
    """``rank_split`` of the features that ``model`` gives."""
    return rank_split(images.features(model, "evaluate"), images.split, ap)


def rank_split(features: Tensor, split: Split, ap: str) -> dict[str, Any]:
    """mAP, mINP and CMC at ranks 1, 5, 10 (fractions), and how many queries had a match.

    Rows of ``features`` (N, D) that are NaN are left out. ``ap`` names the formula of average precision, as
    ``rank_metrics`` has it.
    """
    readable = torch.isfinite(features).all(dim=1).cpu()
    query = gallery = readable
    if split.queries is not None:
        first = torch.arange(len(readable), device="cpu") < split.queries
        query, gallery = readable & first, readable & ~first
    pids, camids, files = split.pids, split.camids if split.has_cameras else None, split.files
    rows = {"query": query, "gallery": gallery}
    ranked = {name: features[picked.to(features.device)] for name, picked in rows.items()}
    if split.style is not None:
        ranked = {"query": None, "gallery": None, "distmat": rerank(**ranked, style=split.style)}
    result = rank_metrics(
        **ranked, q_pids=pids[query], g_pids=pids[gallery],
        q_camids=None if camids is None else camids[query], g_camids=None if camids is None else camids[gallery],
        q_images=files[query], g_images=files[gallery], ap=ap,
    )  # fmt: skip
    top = {f"top{rank}": result.top(rank) for rank in (1, 5, 10)}
    return {"mAP": float(result.mAP), "mINP": float(result.mINP), **top, "queries": int(result.num_valid_queries)}
