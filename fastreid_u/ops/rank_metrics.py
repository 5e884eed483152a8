# SPDX-License-Identifier: Apache-2.0
"""Retrieval quality: mAP, CMC and mINP."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    one_or_more,
    require_2d,
    require_bool,
    require_choice,
    require_features,
    require_finite,
    require_floating,
    require_ids,
    require_in_range,
    require_positive_int,
    require_same_device,
    require_same_width,
)
from fastreid_u.ops import _gallery_counts as counts
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops._rank_details import ByCamera, CameraPairs, TrueAccepts, first_listed
from fastreid_u.ops._ranked_lists import Distances, Ids, blocks_of_pairs, counted, scored
from fastreid_u.reference import rank_metrics as reference


@dataclass(frozen=True, eq=False)
class RankMetrics:
    """Retrieval quality over the valid queries: those with a true match left after same-camera images are removed.

    Attributes:
        mAP: mean average precision, in [0, 1]; NaN without a valid query.
        cmc: (max_rank,) float64; entry r - 1 is the share of valid queries whose first match is at rank <= r.
        mINP: mean over queries of (number of matches) / (rank of the last match).
        ap, inp: (num_valid_queries,) float64, per valid query in query order.
        valid: (num_queries,) bool, which queries these are.
        num_valid_queries, num_queries: how many count, how many there were.
        tpr: (F,) float64, with ``fpr``: the share of matches accepted at each false positive rate.
        by_camera: with ``by_camera``, scores of each query camera against each gallery camera.
        top_index, top_distance: (Q, k), with ``top``: the first k of each ranked list; -1 and infinity past its end.
    """

    mAP: float
    cmc: Tensor
    mINP: float
    ap: Tensor
    inp: Tensor
    valid: Tensor
    num_valid_queries: int
    num_queries: int
    tpr: Tensor | None = None
    by_camera: CameraPairs | None = None
    top_index: Tensor | None = None
    top_distance: Tensor | None = None

    def top(self, rank: int) -> float:
        """CMC at ``rank`` (from 1): the share of valid queries with a match among the first ``rank``.

        Beyond the curve, which ends at ``max_rank``, its last value.
        """
        rank = require_positive_int("RankMetrics.top", "rank", rank)
        return float(self.cmc[min(rank, len(self.cmc)) - 1])

    def __str__(self) -> str:
        shown = [f"mAP {self.mAP:.2%}"] + [f"top-{r} {self.top(r):.2%}" for r in (1, 5, 10) if r <= len(self.cmc)]
        return " · ".join([*shown, f"mINP {self.mINP:.2%}", f"{self.num_valid_queries} of {self.num_queries} queries"])


def rank_metrics(
    query: Tensor | None,
    gallery: Tensor | None,
    q_pids: Tensor,
    g_pids: Tensor,
    q_camids: Tensor | None = None,
    g_camids: Tensor | None = None,
    *,
    distmat: Tensor | None = None,
    q_images: Tensor | None = None,
    g_images: Tensor | None = None,
    ap: str = "rank",
    max_rank: int = 100,
    fpr: float | Any | None = None,
    by_camera: bool = False,
    top: int | None = None,
    backend: str = "auto",
) -> RankMetrics:
    """Rank the gallery for each query and score the lists, the Market-1501 way.

    Args:
        query: (Q, D) floating point features, unit rows usually; ranked by squared distance. None with ``distmat``.
        gallery: (G, D) features on the same device. None with ``distmat``.
        q_pids, g_pids: (Q,) and (G,) integer identities, tensors, arrays or lists.
        q_camids, g_camids: (Q,) and (G,) integer cameras: gallery images that share identity and camera with the query
            are removed from its list. Without both no camera matters.
        distmat: (Q, G) floating point distances instead of features, smaller is nearer.
        q_images, g_images: (Q,) and (G,) integers that number the images, where some are in both sets: an image is
            removed from its own list, or it would be its own nearest match. ``range(N)`` for both scores a set against
            itself.
        ap: "rank", mean over matches of precision at their rank; "sklearn", the same with equal distances taken as one
            step, as scikit-learn does; "trapezoid", area under straight lines between the points of "sklearn".
        max_rank: length of the CMC curve; it stays at its last value beyond the end of a short list.
        fpr: false positive rate, in [0, 1], or several. Of all query-gallery pairs of the valid queries, junk removed,
            a threshold accepts those within a distance, all of a tie or none. ``tpr`` is the largest share of matches
            that one accepts which accepts no more than floor(fpr x others) of the other pairs.
        by_camera: also score each query camera against each gallery camera alone, by the same rules.
        top: also list the first ``top`` of each ranking, junk left out: gallery indices and distances (squared, in
            float32, from features). More than G is G.
        backend: "auto", "numba" (a CPU), "triton" (a GPU) or "reference"; anything but "auto" runs there or raises.

    Returns:
        :class:`RankMetrics`. Queries without a true match left are not counted; if that is all of them, mAP, mINP and
        CMC are NaN, with a warning that gives the reason. Equal distances rank by gallery index.

    Raises:
        TypeError, ValueError: wrong type, shape or choice, NaN or infinity; the message names argument, rule and value.

    The rank of a match is the number of gallery images before it, which is counted in blocks of scores: nothing is
    sorted, never Q x G, beside a ``distmat`` that is one. Distances from features are squared, summed in float64 and
    rounded to 24 bits, so copies tie. Memory: a centred copy of the queries, 80 MB of blocks, 100 bytes a pair of one
    identity, 2**20 such pairs at a time. ``by_camera`` counts camera by camera, with a copy of
    one camera's gallery; ``fpr`` passes over the gallery again, twice or more, in which more is measured than for the
    ranks, in 16 bytes a pair of one identity and 100 MB; ``top`` is a ``knn`` of its own, with its memory. Each may
    take several times the time of the ranks.

    Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015; mINP: Ye et al., TPAMI 2021.
    """
    op = "rank_metrics"
    if distmat is None:
        if query is None or gallery is None:
            raise ValueError(f"{op}: query and gallery must be given without distmat, got None")
        query, gallery = require_features(op, "query", query), require_features(op, "gallery", gallery)
        require_same_width(op, "gallery", gallery, "query", query)
        require_same_device(op, "gallery", gallery, "query", query)
        shape, device = (len(query), len(gallery)), query.device
    else:
        if query is not None or gallery is not None:
            raise ValueError(f"{op}: query and gallery must be None with distmat, got features as well")
        distmat = require_floating(op, "distmat", require_2d(op, "distmat", as_tensor(op, "distmat", distmat)))
        distmat = require_finite(op, "distmat", distmat.detach(), always=True)
        if distmat.dtype not in (torch.float32, torch.float64):
            distmat = distmat.float()
        shape, device = tuple(distmat.shape), distmat.device

    q_pids, g_pids = _ids(op, "q_pids", q_pids, shape[0]), _ids(op, "g_pids", g_pids, shape[1])
    q_camids, g_camids = _both_or_none(op, "camids", q_camids, g_camids, shape)
    q_images, g_images = _both_or_none(op, "images", q_images, g_images, shape)
    require_choice(op, "ap", ap, ("rank", "sklearn", "trapezoid"))
    max_rank = require_positive_int(op, "max_rank", max_rank)
    if len(q_pids) and q_camids is None and q_images is None and torch.equal(q_pids.cpu(), g_pids.cpu()):
        _warn_of_own_matches(op, query, gallery, distmat)

    details = _details(op, fpr, by_camera, top, q_camids)
    run = choose(
        op, device, backend, reference=reference.rank_metrics,
        numba=partial(_counted, counts.OfFeatures, counts.OfMatrix),
        triton=partial(_counted, counts.OfFeaturesOnGPU, counts.OfMatrixOnGPU),
    )  # fmt: skip
    scores = run(
        query, gallery, q_pids, g_pids, q_camids, g_camids, distmat=distmat, q_images=q_images, g_images=g_images,
        ap=ap, max_rank=max_rank, **details,
    )  # fmt: skip
    found = {**scores._asdict(), "by_camera": scores.by_camera and CameraPairs(*scores.by_camera)}
    metrics = RankMetrics(**found, num_valid_queries=len(scores.ap), num_queries=len(q_pids))
    if metrics.num_valid_queries == 0:
        if len(q_pids) == 0:
            why = "there are no queries"
        elif len(g_pids) == 0:
            why = "the gallery is empty"
        elif q_camids is not None and torch.isin(q_pids.cpu(), g_pids.cpu()).any():
            why = (
                "every true match shares its query's camera; without camera ids (ignore_cameras of train and evaluate) "
                "none would be removed"
            )
        elif torch.isin(q_pids.cpu(), g_pids.cpu()).any():
            why = "every true match is the query's own image"
        else:
            why = "no identity of the query is in the gallery"
        warnings.warn(f"{op}: none of {shape[0]} queries can be scored, the metrics are NaN: {why}", stacklevel=2)
    return metrics


def _details(op: str, fpr: Any, by_camera: bool, top: int | None, camids: Tensor | None) -> dict[str, Any]:
    """The results asked for beside the usual ones, checked."""
    fprs = None if fpr is None else [require_in_range(op, "fpr", rate, 0, 1) for rate in one_or_more(op, "fpr", fpr)[0]]
    if require_bool(op, "by_camera", by_camera) and camids is None:
        raise ValueError(f"{op}: q_camids and g_camids must be given with by_camera, got None")
    return {
        "fprs": fprs, "by_camera": by_camera, "top": None if top is None else require_positive_int(op, "top", top)
    }  # fmt: skip


def _counted(
    of_features: type, of_matrix: type, query: Tensor | None, gallery: Tensor | None, *numbers: Tensor | None,
    distmat: Tensor | None, q_images: Tensor | None, g_images: Tensor | None, ap: str, max_rank: int,
    fprs: list[float] | None, by_camera: bool, top: int | None,
) -> reference.Scores:  # fmt: skip
    """As ``reference.rank_metrics``, from counts of a backend."""
    ids = Ids(*(None if x is None else x.cpu().numpy() for x in (*numbers, q_images, g_images)))
    distances: Distances = of_features(query, gallery) if distmat is None else of_matrix(distmat)
    device = (query if distmat is None else distmat).device
    cameras = ByCamera(ids) if by_camera else None
    accepts = TrueAccepts(ids, len(ids.g_pids)) if fprs is not None else None
    aps, inps, firsts, valid = [], [], [], np.zeros(len(ids.q_pids), bool)
    for pairs in blocks_of_pairs(ids, distances):
        found = counted(pairs, distances, len(valid)) if cameras is None else cameras.count(pairs, distances, ap)
        lists = scored(pairs.row, pairs, found, ap)
        valid[lists.group] = True
        aps.append(lists.ap)
        inps.append(lists.inp)
        firsts.append(lists.first)
        if accepts is not None:
            accepts.add(pairs)
    ap_of, inp_of, first = (np.concatenate([np.empty(0), *parts]) for parts in (aps, inps, firsts))
    within = np.bincount(first[first <= max_rank].astype(np.int64), minlength=max_rank + 1)[1:].cumsum()
    count = len(ap_of)
    listed = (None, None) if top is None else first_listed(query, gallery, distmat, ids, min(top, len(ids.g_pids)))
    return reference.Scores(
        mAP=float(ap_of.mean()) if count else float("nan"),
        cmc=torch.from_numpy(within / (count or np.nan)).to(device),
        mINP=float(inp_of.mean()) if count else float("nan"),
        ap=torch.from_numpy(ap_of).to(device),
        inp=torch.from_numpy(inp_of).to(device),
        valid=torch.from_numpy(valid).to(device),
        tpr=None if accepts is None else torch.from_numpy(accepts.result(distances, fprs)).to(device),
        by_camera=None if cameras is None else cameras.result(device),
        top_index=listed[0], top_distance=listed[1],
    )  # fmt: skip


def _warn_of_own_matches(op: str, query: Tensor | None, gallery: Tensor | None, distmat: Tensor | None) -> None:
    """Query and gallery with the same identities in the same order may be one set, in which each finds itself first."""
    own = torch.equal(query, gallery) if distmat is None else not distmat.diagonal().any()
    if own:
        warnings.warn(
            f"{op}: query and gallery are the same images and each finds itself first; pass q_images and g_images, "
            "both range(N), to leave it out",
            stacklevel=3,
        )


def _both_or_none(
    op: str, name: str, of_query: object, of_gallery: object, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """``q_name`` and ``g_name``, checked; given together or not at all."""
    if (of_query is None) != (of_gallery is None):
        missing = "q" if of_query is None else "g"
        raise ValueError(f"{op}: q_{name} and g_{name} must be given together, got no {missing}_{name}")
    if of_query is None:
        return None, None
    return _ids(op, f"q_{name}", of_query, shape[0]), _ids(op, f"g_{name}", of_gallery, shape[1])


def _ids(op: str, name: str, values: object, count: int) -> Tensor:
    values = require_ids(op, name, values)
    if len(values) != count:
        raise ValueError(f"{op}: {name} must have {count} entries, got {len(values)}")
    return values
