# SPDX-License-Identifier: Apache-2.0
"""Mean feature of each cluster, or of each camera's share of it: the start of a memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import (
    require_features,
    require_ids,
    require_same_device,
    require_same_length,
)
from fastreid_u._label_checks import require_cluster_numbers
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops.segments import segment_mean
from fastreid_u.reference import centroids as reference


def cluster_centroids(x: Tensor, labels: Tensor, *, normalize: bool = True, backend: str = "auto") -> Tensor:
    """The mean of the rows of each cluster, by default scaled to unit length.

    Args:
        x: (N, D) floating point, any device; taken in float32, averaged as given (not normalised first).
        labels: (N,) integers on the same device, -1 for noise, which is ignored.
        normalize: divide each mean by its length; a mean of zero length stays zero.
        backend: "auto", "segments" (plain torch on a GPU, all clusters at once) or "reference" (cluster by cluster, on
            a CPU); anything but "auto" runs there or raises. "cuda" is an older name of "segments".

    Returns:
        (C, D) float32 on ``x``'s device, C = largest label + 1; a label that no row has gets zeros.
        The same bits every time.

    Raises:
        TypeError, ValueError: wrong type or shape, NaN or infinity, a label below -1 or far above N (from
            100,000 + 10 N on), as some clusterings mark noise.

    Not differentiable. Dai et al., Cluster Contrast, ACCV 2022, section 3.2.
    """
    op = "cluster_centroids"
    x = require_features(op, "x", x)
    labels = _ids(op, "labels", labels, x)
    require_cluster_numbers(op, "labels", labels)
    backend = "segments" if backend == "cuda" else backend  # its name in older versions
    run = choose(op, x.device, backend, segments=_by_segments, reference=reference.cluster_centroids)
    return run(x, labels, normalize=normalize)


def _by_segments(x: Tensor, labels: Tensor, *, normalize: bool) -> Tensor:
    means = segment_mean(x, labels)
    return F.normalize(means, dim=1, eps=1e-12) if normalize else means


def proxy_centroids(
    x: Tensor, labels: Tensor, cameras: Tensor, *, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of what each camera saw of each cluster, by default scaled to unit length: the start of a proxy memory.

    Args:
        x: (N, D) floating point, any device; taken in float32, averaged as given. CAP normalises it before.
        labels: (N,) integers on the same device, -1 for noise, which is ignored.
        cameras: (N,) integers, any numbers.
        normalize: divide each mean by its length; a mean of zero length stays zero.

    Returns:
        ``(proxies, clusters, cameras)``: (Q, D) float32, (Q,) and (Q,) int64, one row for each pair that occurs,
        cameras ascending, in each camera the clusters ascending, as CAP and ICE number them. The same bits every time.

    Raises:
        TypeError, ValueError: wrong type or shape, NaN or infinity, a label below -1 or far above N (from
            100,000 + 10 N on), as some clusterings mark noise.

    Not differentiable. Wang et al., CAP, AAAI 2021; Chen et al., ICE, ICCV 2021.
    """
    op = "proxy_centroids"
    x = require_features(op, "x", x)
    labels, cameras = _ids(op, "labels", labels, x), _ids(op, "cameras", cameras, x)
    require_cluster_numbers(op, "labels", labels)
    kept = labels >= 0
    seen, camera = cameras.unique(return_inverse=True)
    known, cluster = labels.unique(return_inverse=True)
    pairs, slot = (camera * len(known) + cluster)[kept].unique(return_inverse=True)
    proxies = cluster_centroids(x[kept], slot, normalize=normalize)
    return proxies, known[pairs % max(len(known), 1)], seen[pairs // max(len(known), 1)]


def _ids(op: str, name: str, ids: Tensor, x: Tensor) -> Tensor:
    ids = require_ids(op, name, ids)
    require_same_length(op, name, ids, "x", x)
    return require_same_device(op, name, ids, "x", x)
