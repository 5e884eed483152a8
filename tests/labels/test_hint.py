# SPDX-License-Identifier: Apache-2.0
"""Neighbours of last epoch as a hint: by image, whichever can be read; labels are those without."""

import pytest
import torch

from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.labels import generator
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.ops.pseudo_labels import pseudo_labels


def test_last_neighbours_are_hints_by_image(clustered, monkeypatch):
    given = []

    def search(x, k, *, hint=None):
        given.append(hint)
        return search.knn(x, k, hint=hint)

    search.knn = generator.knn
    monkeypatch.setattr(generator, "knn", search)
    images = Images(60)
    labels = DBSCANLabels(Config(k1=5, k2=2), images)
    x = clustered(60, 8)
    images.readable[[3, 50]] = False
    first = labels(x, 0)
    images.readable[:] = True
    images.readable[7] = False
    second = labels(x, 1)
    assert given[0] is None
    assert given[1].shape == (59, 5)
    assert (given[1][3] == -1).all(), "image 3 had no neighbours yet"
    assert given[1][7, 0] == 7, "image 8 is row 7 now"
    assert "_last" not in " ".join(labels.state_dict())
    for found, gone in ((first, [3, 50]), (second, [7])):
        kept = torch.ones(60, dtype=torch.bool)
        kept[gone] = False
        assert (found[gone] == -1).all()
        alone = pseudo_labels(x[kept], eps=labels.config.eps, min_samples=labels.config.min_samples, k1=5, k2=2)
        assert torch.equal(found[kept], alone)


def test_labels_do_not_depend_on_a_hint(clustered):
    x = clustered(90, 12)
    expected = pseudo_labels(x, k1=10)
    hint = torch.randint(-1, 90, (90, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pseudo_labels(x, k1=10, hint=hint), expected)
    with pytest.raises(ValueError, match=r"pseudo_labels: hint must lie in \[-1, 90\), got 90"):
        pseudo_labels(x, k1=10, hint=hint.fill_(90))
