# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels by Infomap, which looks for modules that a random walk on the neighbour graph stays in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u import _env
from fastreid_u._checks import clip_count, require_features, require_in_range, require_positive_int
from fastreid_u.ops.k_reciprocal import neighbours


def infomap_labels(
    x: Tensor,
    *,
    min_similarity: float = 0.5,
    k1: int = 15,
    min_size: int = 5,
    seed: int = 123,
    knn: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Infomap's labels on the directed graph of nearest neighbours, as Cluster Contrast's InfoMap variant makes them.

    Rows are scaled to unit length. Row i links to those of its ``k1`` nearest rows, itself left out, whose cosine
    similarity is at least ``min_similarity``; the link weighs that similarity. Infomap splits the linked rows into
    modules (two levels, directed, one trial); a row without links is a module of its own. Modules of fewer than
    ``min_size`` rows are noise.

    Args:
        x: (N, D) floating point, any device; taken in float32.
        min_similarity: in (0, 1], inclusive; the published scripts call it eps.
        k1: neighbours looked at, the row itself included.
        min_size: rows of the smallest cluster; the published k2 is one less.
        seed: of Infomap's random order; 123 is its own default.
        knn: a ready ``(sq_dist, index)`` of :func:`fastreid_u.knn` on the rows of ``x`` scaled to unit length, at least
            k1 columns; saves the search.

    Returns:
        (N,) int64 on ``x``'s device, -1 for noise, else 0 .. C - 1 in the order of each cluster's first row.

    Raises:
        TypeError, ValueError: wrong type, shape or count, NaN or infinity.
        RuntimeError: the package ``infomap`` is not installed.

    Similarity is 1 - d^2 / 2 of our exact distances, the same both ways, so every row that is linked to has a link of
    its own (its nearest is no farther); rows of zeros have none. Links are handed over row by row, nearest first, and
    nodes carry the number of their row, so equal features give equal labels under one version of Infomap; another
    version may give others. It runs on one CPU thread. Memory: 12 N k1 bytes for the lists and some hundred bytes a
    link in Python and in Infomap.

    Infomap is under the GPL (older releases: AGPL): it is imported when this is called and at no other time, and comes
    only with the extra ``[infomap]``. Rosvall and Bergstrom, PNAS 2008.
    """
    op = "infomap_labels"
    x = require_features(op, "x", x)
    min_similarity = require_in_range(op, "min_similarity", min_similarity, 0, 1, open_low=True)
    k1, min_size = require_positive_int(op, "k1", k1), require_positive_int(op, "min_size", min_size)
    seed = require_positive_int(op, "seed", seed)
    if not _env.infomap().present:
        raise RuntimeError(f"{op}: infomap must be installed, got none: {_env.infomap().detail}")
    k1 = clip_count(op, "k1", k1, len(x))
    if len(x) == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    source, target, weight = links(x, k1, min_similarity, knn)
    module = torch.arange(len(x), device="cpu")  # every row alone
    for row, number in _modules(source, target, weight, seed).items():
        module[row] = len(x) + number
    return clusters(module, min_size).to(x.device)


def links(
    x: Tensor, k1: int, min_similarity: float, knn: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (E,), targets (E,) and similarities (E,) float64, by source and nearest first; on ``x``'s device."""
    rows = F.normalize(x, dim=1)
    sq_dist, index = (part[:, :k1] for part in neighbours("infomap_labels", rows, k1, knn))
    similarity = 1 - sq_dist.double() / 2
    row = torch.arange(len(x), device=x.device)[:, None].expand_as(index)
    pointed = (rows != 0).any(dim=1)  # of rows of zeros the distance does not tell the similarity, which is 0
    linked = (similarity >= min_similarity) & (index != row) & pointed[index] & pointed[:, None]
    return row[linked], index[linked], similarity[linked]


def clusters(module: Tensor, min_size: int) -> Tensor:
    """(N,) modules of any number as labels: -1 for those of fewer than ``min_size`` rows, others by first row."""
    _, module, size = module.unique(return_inverse=True, return_counts=True)
    row = torch.arange(len(module), device=module.device)
    first = row.new_full((len(size),), len(module)).scatter_reduce_(0, module, row, "amin")
    kept = size >= min_size
    label = torch.full_like(first, -1)
    label[first.argsort()[kept[first.argsort()]]] = row[: int(kept.sum())]
    return label[module]


def _modules(source: Tensor, target: Tensor, weight: Tensor, seed: int) -> dict[int, int]:
    """The module of each row that has a link."""
    from infomap import Infomap

    if len(source) == 0:
        return {}
    search = Infomap(f"--two-level --directed --silent --num-trials 1 --seed {seed}")
    search.add_links(zip(source.tolist(), target.tolist(), weight.tolist(), strict=True))
    search.run()
    # By a file, not by Infomap's own iterators: these are SWIG's, as faiss's are, and where both libraries are loaded
    # Python takes one for the other and crashes.
    with tempfile.TemporaryDirectory() as folder:
        search.write_clu(f"{folder}/modules.clu")
        lines = Path(folder, "modules.clu").read_text(encoding="utf-8").splitlines()
    return dict(tuple(map(int, line.split()[:2])) for line in lines if not line.startswith("#"))
