# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal re-ranking of a gallery."""

from __future__ import annotations

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
from fastreid_u.reference import rerank as reference


def rerank(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    distance: str = "sqeuclidean",
    distmats: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distances from queries to gallery, re-ranked by shared k-reciprocal neighbours.

    Args:
        query: (Q, D) floating point features; None with ``distmats``.
        gallery: (G, D) features on the same device; None with ``distmats``.
        k1: neighbours per list, beside the point itself (so k1 + 1 entries, one more than :func:`jaccard_graph` has).
        k2: rows averaged in local query expansion; 1 turns it off.
        lambda_value: weight of the original distance in the mix, in [0, 1].
        distance: "sqeuclidean" (what published evaluators pass in), "euclidean" or "cosine".
        distmats: ready (Q, G), (Q, Q) and (G, G) distances instead of features; ``distance`` is then not used.
        backend: "auto" or "reference"; anything but "auto" runs there or raises.

    Returns:
        (Q, G) float32 on the input's device: ``(1 - lambda_value) * jaccard + lambda_value * original``, where
        "original" is the distance squared once more and divided by the maximum of its column, as published.

    Raises:
        TypeError, ValueError: wrong type, shape or value, NaN or infinity; the message names argument, rule and value.

    Works on all pairs of the Q + G images: about 16 (Q + G)^2 bytes (6 GB for Market-1501). Counts beyond the number of
    images are clipped with a warning. Ties rank by index. Zhong et al., CVPR 2017.
    """
    op = "rerank"
    k1, k2 = require_positive_int(op, "k1", k1), require_positive_int(op, "k2", k2)
    lambda_value = require_in_range(op, "lambda_value", lambda_value, 0, 1)
    require_choice(op, "distance", distance, ("sqeuclidean", "euclidean", "cosine"))
    if distmats is None:
        if query is None or gallery is None:
            raise ValueError(f"{op}: query and gallery must be given without distmats, got None")
        query, gallery = require_features(op, "query", query), require_features(op, "gallery", gallery)
        require_same_width(op, "gallery", gallery, "query", query)
        require_same_device(op, "gallery", gallery, "query", query)
        device, images = query.device, len(query) + len(gallery)
    else:
        distmats = _checked(op, distmats)
        device, images = distmats[0].device, sum(distmats[0].shape)
    k1, k2 = clip_count(op, "k1", k1, max(images - 1, 1)), clip_count(op, "k2", k2, max(images, 1))

    run = choose(op, device, backend, {"reference": reference.rerank})
    return run(query, gallery, k1, k2, lambda_value, distance=distance, distmats=distmats)


def _checked(op: str, distmats: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    if not isinstance(distmats, (tuple, list)) or len(distmats) != 3:
        raise TypeError(f"{op}: distmats must be three matrices (q_g, q_q, g_g), got {type(distmats).__name__}")
    checked = []
    for name, matrix in zip(("q_g", "q_q", "g_g"), distmats, strict=True):
        matrix = require_floating(op, name, require_2d(op, name, as_tensor(op, name, matrix)))
        checked.append(require_finite(op, name, matrix.detach(), always=True).float())
        require_same_device(op, name, checked[-1], "q_g", checked[0])
    rows, columns = checked[0].shape
    for name, matrix, side in (("q_q", checked[1], rows), ("g_g", checked[2], columns)):
        if matrix.shape != (side, side):
            raise ValueError(f"{op}: {name} must have shape {(side, side)} beside q_g, got {tuple(matrix.shape)}")
    return tuple(checked)
