# SPDX-License-Identifier: Apache-2.0
"""Cluster means."""

import pytest
import torch

from fastreid_u.ops.centroids import cluster_centroids, proxy_centroids
from fastreid_u.reference import centroids as reference


def test_golden(golden):
    file = golden("cluster_centres_n300_d64")
    x, labels = file.tensor("features"), file.tensor("labels")
    raw = cluster_centroids(x, labels, normalize=False)
    torch.testing.assert_close(raw, file.tensor("centres_raw"), atol=1e-6, rtol=0)
    torch.testing.assert_close(cluster_centroids(x, labels), file.tensor("memory_start"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "d", "clusters"), [(1, 1, 1), (37, 5, 4), (200, 33, 61)])
def test_mean_of_members_in_float64(n, d, clusters):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, clusters, (n,), generator=generator)
    labels[0] = clusters - 1
    membership = (labels == torch.arange(clusters)[:, None]).double()
    expected = membership @ x / membership.sum(1, keepdim=True).clamp(min=1)
    found = reference.cluster_centroids(x, labels, normalize=False)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    rounded = cluster_centroids(x, labels, normalize=False)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), expected, atol=1e-6, rtol=0)


def test_noise_and_labels_that_nobody_has():
    x = torch.tensor([[2.0, 0.0], [9.0, 9.0], [0.0, 3.0], [4.0, 0.0]])
    found = cluster_centroids(x, torch.tensor([0, -1, 3, 0]), normalize=False)
    assert found.tolist() == [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 3.0]]
    unit = cluster_centroids(x, torch.tensor([0, -1, 3, 0]))
    assert unit.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]


def test_members_that_cancel_stay_zero():
    found = cluster_centroids(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]))
    assert found.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("labels", [[], [-1, -1, -1]])
def test_no_cluster_at_all(labels):
    found = cluster_centroids(torch.ones(len(labels), 5), torch.tensor(labels, dtype=torch.int64))
    assert tuple(found.shape) == (0, 5)


def test_arrays_and_small_label_types(clustered):
    x = clustered(30, 4)
    labels = torch.arange(30) % 7 - 1
    expected = cluster_centroids(x, labels)
    assert torch.equal(cluster_centroids(x.numpy(), labels.numpy().astype("int16")), expected)
    assert torch.equal(cluster_centroids(x.requires_grad_(), labels), expected)


@pytest.mark.parametrize(
    ("x", "labels", "error", "message"),
    [
        (
            torch.ones(3, 2),
            torch.tensor([0, 1]),
            ValueError,
            r"labels must have one entry for each row of x \(3\), got 2",
        ),
        (torch.ones(2, 2), torch.tensor([0, -2]), ValueError, "labels must lie in .*, got -2"),
        (torch.ones(2, 2), torch.tensor([0.0, 1.0]), TypeError, "labels must hold integers, got torch.float32"),
        (torch.ones(2, 2), torch.zeros(2, 1).long(), ValueError, r"labels must be 1-D, got shape \(2, 1\)"),
    ],
)
def test_rejects(x, labels, error, message):
    with pytest.raises(error, match=f"cluster_centroids: {message}"):
        cluster_centroids(x, labels)


@pytest.mark.parametrize("name", ["cap_grouping_n240_eps0.6", "cap_grouping_n300_eps0.5"])
def test_proxies_golden(golden, name):
    file = golden(name)
    x = torch.nn.functional.normalize(file.tensor("features_raw"))
    found, clusters, cameras = proxy_centroids(x, file.tensor("labels"), file.tensor("cams"))
    for camera in range(file.meta["params"]["cams"]):
        rows = cameras == camera
        torch.testing.assert_close(found[rows], file.tensor(f"prototypes_cam{camera}"), atol=1e-6, rtol=0)
        assert clusters[rows].tolist() == sorted(clusters[rows].tolist())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "clusters"), [(1, 1), (5, 9), (90, 7)])
def test_proxies_match_the_reference(n, clusters, normalize):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator)
    labels = 10 * torch.randint(-1, clusters, (n,), generator=generator)
    labels[labels < 0] = -1
    cameras = 7 - 3 * torch.randint(4, (n,), generator=generator)  # some negative, none contiguous
    found = proxy_centroids(x, labels, cameras, normalize=normalize)
    expected = reference.proxy_centroids(x, labels, cameras, normalize=normalize)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_no_proxy_at_all():
    for n in (0, 3):
        found = proxy_centroids(torch.ones(n, 5), torch.full((n,), -1), torch.arange(n))
        assert [tuple(each.shape) for each in found] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize(
    ("labels", "cameras", "error", "message"),
    [
        (torch.tensor([0, -2]), torch.tensor([0, 1]), ValueError, "labels must lie in .*, got -2"),
        (torch.tensor([0, 1]), torch.tensor([0]), ValueError, "cameras must have one entry for each row of x"),
        (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), TypeError, "cameras must hold integers"),
    ],
)
def test_proxies_reject(labels, cameras, error, message):
    with pytest.raises(error, match=f"proxy_centroids: {message}"):
        proxy_centroids(torch.ones(2, 2), labels, cameras)


@pytest.mark.parametrize("normalize", [True, False])
def test_what_runs_on_a_gpu_gives_the_means_of_the_reference(clustered, normalize):
    from fastreid_u.ops.centroids import _by_segments

    x = clustered(200, 16)
    labels = torch.arange(200) % 23 - 1
    labels[labels == 7] = 8  # a label that nobody has
    expected = cluster_centroids(x, labels, normalize=normalize)
    torch.testing.assert_close(_by_segments(x, labels, normalize=normalize), expected, atol=1e-6, rtol=0)
