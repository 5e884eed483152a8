# SPDX-License-Identifier: Apache-2.0
"""The published pipeline as benchmarks restate it gives what the library gives."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastreid_u

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs a source checkout around it")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def part(name):
    return importlib.import_module(f"published.{name}")


def people(n, d, seed):
    """Unit rows of identities of about ten, and the identities."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n // 10, d, generator=generator)
    identity = torch.randint(n // 10, (n,), generator=generator)
    return F.normalize(centre[identity] + 0.8 * torch.randn(n, d, generator=generator)), identity


@pytest.mark.parametrize(("n", "k1", "k2", "seed"), [(300, 12, 4, 0), (257, 15, 1, 1), (300, 20, 6, 2)])
def test_labels(n, k1, k2, seed):
    pytest.importorskip("faiss", reason="the published search")
    x, _ = people(n, 24, seed)
    found, seconds = part("label").label(x, k1=k1, k2=k2, eps=0.55, min_samples=3)
    assert list(seconds) == ["search", "jaccard", "dbscan"]
    expected = fastreid_u.pseudo_labels(x, k1=k1, k2=k2, eps=0.55, min_samples=3)
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.max() > 3
    assert (found == -1).any()


def test_evaluation():
    x, identity = people(200, 16, 3)
    camera = torch.arange(200) % 3
    sample = part("images").Sample
    rows = [sample("", int(pid), int(cam)) for pid, cam in zip(identity, camera, strict=True)]
    ranked = part("evaluate")
    found = ranked.rank(ranked.distances(x[:40], x[40:]), rows[:40], rows[40:])
    expected = fastreid_u.rank_metrics(
        x[:40], x[40:], identity[:40], identity[40:], camera[:40], camera[40:], ap="sklearn"
    )
    assert found.mAP == pytest.approx(expected.mAP, abs=1e-6)
    np.testing.assert_allclose(found.cmc, expected.cmc.numpy(), atol=1e-12)
    assert 0.1 < found.mAP < 0.99


def test_memory():
    x, identity = people(120, 16, 4)
    labels = identity.unique(return_inverse=True)[1]
    labels[::7] = -1
    labels[labels >= 0] = labels[labels >= 0].unique(return_inverse=True)[1]
    rows = part("memory").centroids(x, labels.tolist())
    expected = fastreid_u.cluster_centroids(x[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)

    ours = fastreid_u.ClusterMemory.from_centroids(rows.clone(), temp=0.05, momentum=0.1)
    theirs = part("memory").Memory(rows.clone(), 0.05, 0.1)
    batch = (labels >= 0).nonzero()[:, 0][:40]
    inputs = [(2 * x[batch]).requires_grad_() for _ in range(2)]
    losses = theirs(inputs[0], labels[batch]), ours.loss(inputs[1], labels[batch])
    for loss in losses:
        loss.backward()
    ours.update_(inputs[1].detach(), labels[batch])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(theirs.rows, ours.features, rtol=0, atol=1e-5)
    assert not torch.equal(theirs.rows, rows)


def test_views_of_an_image():
    from PIL import Image

    images = part("images")
    picture = Image.fromarray((np.arange(40 * 20 * 3) % 251).astype(np.uint8).reshape(40, 20, 3))
    plain = images.plain_view(40, 20)(picture)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.MEAN, images.STD))
    torch.testing.assert_close(plain, (expected - mean) / std)
    assert images.train_view(40, 20)(picture).shape == plain.shape
    erased = images.Erasing(1.0)(plain.clone())
    changed = (erased != plain).any(dim=0)
    assert 0.02 * 0.5 < changed.float().mean() < 0.4 * 1.2
    assert (erased[:, changed] == torch.tensor(images.MEAN)[:, None]).all()
