# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal re-ranking of a gallery."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    clip_count,
    require_2d,
    require_choice,
    require_features,
    require_finite,
    require_floating,
    require_in_range,
    require_positive_int,
    require_same_device,
    require_same_width,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops._scaled_distance import FromFeatures, FromMatrices, Unscaled, in_step, ordered_bits
from fastreid_u.ops.knn import knn as nearest_neighbours
from fastreid_u.reference import rerank as reference

STYLES = ("openreid", "zhong", "clustering")

_LARGEST = 2.0**63  # whose square float32 still holds
_BELOW_ZERO = 0.01  # of the largest distance, or of 1: what half precision may round below zero
_BLOCK = 2**23  # entries of a block of queries against the gallery: 64 MB of float64


def rerank(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    style: str = "openreid",
    distance: str = "sqeuclidean",
    distmats: tuple[Tensor, Tensor, Tensor] | None = None,
    top: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Distances from queries to gallery, re-ranked by shared k-reciprocal neighbours.

    Args:
        query: (Q, D) floating point features; None with ``distmats``.
        gallery: (G, D) features on the same device; None with ``distmats``.
        k1: neighbours per list, beside the point itself (so k1 + 1 entries, one more than :func:`jaccard_graph` has);
            with "clustering" the point itself included.
        k2: rows averaged in local query expansion; 1 turns it off. With "clustering" at most k1.
        lambda_value: weight of the original distance in the mix, in [0, 1].
        style: which of the three published rules, whose figures differ by up to two points of mAP.
            "openreid", of Open-ReID, torchreid, SpCL and Cluster Contrast: the distance squared once more and divided
            by the maximum of its column is what weighs neighbours and is mixed in.
            "zhong", of the authors' version for features and of TransReID: the same, not squared once more.
            "clustering", of the evaluators of fast-reid (with "cosine") and OpenUnReID: :func:`jaccard_distance` mixed
            with the plain distance.
        distance: "sqeuclidean" (what published evaluators pass in), "euclidean" or "cosine".
        distmats: ready (Q, G), (Q, Q) and (G, G) distances instead of features; ``distance`` is then not used. None
            is negative, but for rounding: by a hundredth of the largest (or of 1, if that is more) at most. Not with
            "clustering", which searches features.
        top: keep this many gallery images a query instead of all G; more than there are is clipped with a warning.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU) or
            "reference"; anything but "auto" runs there or raises.

    Returns:
        (Q, G) float32 on the input's device: ``(1 - lambda_value) * jaccard + lambda_value * original``, "original"
        being the distance as ``style`` has it. With ``top``: ``(distance, index)``, both (Q, top), float32 and int64,
        the nearest of each row in ascending order, of equal ones the lower index first.

    Raises:
        TypeError, ValueError: wrong type, shape or value, NaN or infinity; the message names argument, rule and value.

    Never (Q + G)^2: the column maxima come from a search for the farthest rows, everything else from neighbour lists.
    Memory: the result, 4 Q G bytes (0.21 GB for Market-1501, 3.8 GB for MSMT17; 12 Q top with ``top``), four times
    the features, and 1 GB at most of sparse rows and blocks; beside ``distmats`` only the latter. "reference" takes 20
    (Q + G)^2 bytes. Time goes into the two searches, and into the product of queries and gallery in float64.

    Counts beyond the number of images are clipped with a warning. Equal distances rank the image itself first, then by
    index; query expansion takes them by index alone. So copies (equal rows of features; with ``distmats`` equal columns
    of q_q or g_g and equal rows or columns of q_g beside them) have one result for ``k2`` of 2 and more, in any order
    of the rows, and a Jaccard distance of 0. It is above 0 only where ``distmats`` leave one of the k2 images averaged
    without a reciprocal neighbour, itself included. What is mixed in is equal within the rounding of float64 products.

    Rows of zeros have no direction: under "cosine" they are at 1 from all others and at 0 from each other. Overlaps are
    integers, exact for the encoding, so the result does not depend on threads or atomics; it is within 2e-6 of the
    published float32. Not differentiable. Zhong et al., CVPR 2017; Open-ReID, torchreid, fast-reid and
    OpenUnReID for the rules that go by ``style``.
    """
    op = "rerank"
    k1, k2 = require_positive_int(op, "k1", k1), require_positive_int(op, "k2", k2)
    lambda_value = require_in_range(op, "lambda_value", lambda_value, 0, 1)
    require_choice(op, "style", style, STYLES)
    require_choice(op, "distance", distance, ("sqeuclidean", "euclidean", "cosine"))
    if distmats is None:
        if query is None or gallery is None:
            raise ValueError(f"{op}: query and gallery must be given without distmats, got None")
        query, gallery = require_features(op, "query", query), require_features(op, "gallery", gallery)
        require_same_width(op, "gallery", gallery, "query", query)
        require_same_device(op, "gallery", gallery, "query", query)
        device, images = query.device, len(query) + len(gallery)
    else:
        distmats = _checked(op, distmats, style)
        if query is not None or gallery is not None:
            raise ValueError(f"{op}: query and gallery must be None with distmats, got features as well")
        device, images = distmats[0].device, sum(distmats[0].shape)
    if style == "clustering" and k2 > k1:
        raise ValueError(f"{op}: k2 must be at most k1 ({k1}) with style 'clustering', got {k2}")
    most = max(images - (style != "clustering"), 1)
    if images and (k1 > most or k2 > images):
        warnings.warn(f"{op}: k1={k1}, k2={k2} is more than the {images} images there are, clipped", stacklevel=2)
    k1, k2 = min(k1, most), min(k2, max(images, 1))
    shape = (len(query), len(gallery)) if distmats is None else tuple(distmats[0].shape)
    if top is not None:
        top = clip_count(op, "top", require_positive_int(op, "top", top), shape[1])

    run = choose(op, device, backend, numba=_numba, triton=_triton, reference=reference.rerank)
    if 0 in shape:
        empty = torch.zeros(shape if top is None else (shape[0], top), dtype=torch.float32, device=device)
        return empty if top is None else (empty, empty.long())
    return run(query, gallery, k1, k2, lambda_value, style=style, distance=distance, distmats=distmats, top=top)


def _numba(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int,
    k2: int,
    lambda_value: float,
    *,
    style: str = "openreid",
    top: int | None,
    **given,
) -> Tensor | tuple[Tensor, Tensor]:
    from fastreid_u.cpu import rerank as cpu

    source, threads = _source(query, gallery, style=style, backend="numba", **given), torch.get_num_threads()
    full = full_list(k1, style)
    ranking, by_index = (lists.numpy().astype(np.int32) for lists in source.ranking(max(full, k2)))
    encoding = cpu.encode(
        ranking,
        full,
        half_list(k1),
        by_index[:, :k2],
        source.num_query,
        lambda row, column: source.pairs(*map(torch.from_numpy, (row, column))).numpy(),
        threads,
    )
    size = len(ranking) - source.num_query

    def overlaps(first: int, last: int) -> Tensor:
        return torch.from_numpy(cpu.overlaps(encoding, first, last, size, threads))

    return _mixed(source, overlaps, encoding.weight, size, lambda_value, top)


def _triton(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int,
    k2: int,
    lambda_value: float,
    *,
    style: str = "openreid",
    top: int | None,
    **given,
) -> Tensor | tuple[Tensor, Tensor]:
    from fastreid_u.kernels import rerank as kernel
    from fastreid_u.kernels.k_reciprocal import k_reciprocal

    source = _source(query, gallery, style=style, backend="triton", **given)
    full = full_list(k1, style)
    ranking, by_index = source.ranking(max(full, k2))
    *rows, weight = k_reciprocal(
        None, ranking, full, k2, half=half_list(k1), measure=source.pairs, averaged=by_index[:, :k2]
    )
    size = len(ranking) - source.num_query
    inverted = kernel.invert(*rows, source.num_query)

    def overlaps(first: int, last: int) -> Tensor:
        return kernel.overlaps(*rows, inverted, first, last, size)

    return _mixed(source, overlaps, weight, size, lambda_value, top)


def _source(
    query: Tensor | None,
    gallery: Tensor | None,
    *,
    style: str,
    distance: str,
    distmats: tuple[Tensor, Tensor, Tensor] | None,
    backend: str,
) -> FromFeatures | FromMatrices:
    power = 2 if style == "openreid" else 1
    if distmats is not None:
        return FromMatrices(*distmats, power)
    search = functools.partial(nearest_neighbours, backend=backend)
    if style == "clustering":
        return Unscaled(query, gallery, distance, search)
    return FromFeatures(query, gallery, distance, search, power)


def full_list(k1: int, style: str) -> int:
    """Entries of the full lists: published clustering code asks for k1 + 1 where it has found k1."""
    return k1 if style == "clustering" else k1 + 1


def half_list(k1: int) -> int:
    """Entries of the half lists: round-half-even(k1 / 2) + 1, as the published np.around has it."""
    return round(k1 / 2) + 1


def _mixed(
    source: FromFeatures | FromMatrices,
    overlaps: Callable[[int, int], Tensor],
    weight: int,
    size: int,
    lambda_value: float,
    top: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The result, a block of queries at a time; ``overlaps`` gives their integer overlaps with the ``size`` gallery
    rows, all rows adding up to ``weight``."""
    queries, device = source.num_query, source.device
    if top is None:
        out = (torch.empty(queries, size, dtype=torch.float32, device=device),)
    else:
        out = tuple(torch.empty(queries, top, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64))
    step = max(1, _BLOCK // size)
    for first in range(0, queries, step):
        last = min(first + step, queries)
        final = source.to_gallery(first, last)
        for mixed, shared in in_step(final, overlaps(first, last)):
            shared = shared.double()
            mixed.mul_(lambda_value)
            mixed += (weight - shared).mul_(2 * (1 - lambda_value)).div_(shared.neg_().add_(2 * weight))
        for whole, part in zip(out, (final,) if top is None else _nearest(final.float(), top), strict=True):
            whole[first:last] = part
    return out[0] if top is None else out


def _nearest(distance: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` smallest of each row, ascending, ties by index."""
    key = ordered_bits(distance) << 32  # one integer a pair
    key += torch.arange(distance.shape[1], device=key.device)
    index = key.topk(top, largest=False, sorted=True).values & 0xFFFFFFFF
    return distance.gather(1, index), index


def _checked(op: str, distmats: tuple[Tensor, Tensor, Tensor], style: str) -> tuple[Tensor, ...]:
    if style == "clustering":
        raise ValueError(f"{op}: distmats must be left out with style 'clustering', which searches features, got some")
    if not isinstance(distmats, (tuple, list)) or len(distmats) != 3:
        raise TypeError(f"{op}: distmats must be three matrices (q_g, q_q, g_g), got {type(distmats).__name__}")
    checked, smallest, largest = [], {}, 0.0
    for name, matrix in zip(("q_g", "q_q", "g_g"), distmats, strict=True):
        matrix = require_floating(op, name, require_2d(op, name, as_tensor(op, name, matrix)))
        matrix = require_finite(op, name, matrix.detach(), always=True)
        low, high = (float(value) for value in matrix.aminmax()) if matrix.numel() else (0.0, 0.0)
        if style == "openreid" and max(-low, high) >= _LARGEST:
            raise ValueError(f"{op}: {name} must be below 2**63, as distances are squared, got {max(-low, high):g}")
        if max(-low, high) > torch.finfo(torch.float32).max:
            raise ValueError(f"{op}: {name} must hold distances that float32 can hold, got {max(-low, high):g}")
        checked.append(matrix.float())
        smallest[name], largest = low, max(largest, high)
        require_same_device(op, name, checked[-1], "q_g", checked[0])
    rows, columns = checked[0].shape
    for name, matrix, side in (("q_q", checked[1], rows), ("g_g", checked[2], columns)):
        if matrix.shape != (side, side):
            raise ValueError(f"{op}: {name} must have shape {(side, side)} beside q_g, got {tuple(matrix.shape)}")
    rounding = _BELOW_ZERO * max(1, largest)
    for name, low in smallest.items():
        if low < -rounding:
            raise ValueError(f"{op}: {name} must hold no distance below 0 (or {-rounding:g}, rounded), got {low:g}")
    return tuple(checked)
