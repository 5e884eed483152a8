# SPDX-License-Identifier: Apache-2.0
"""A script may set torch's default device or dtype: every op and its reference still follow the tensors they get.

"meta" stands for "cuda": what lands there by mistake cannot be computed with.
"""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastreid_u
from fastreid_u import _env
from fastreid_u.ops.consistency_kl import consistency_kl
from fastreid_u.ops.hard_instance_nce import hard_instance_nce
from fastreid_u.ops.k_reciprocal import sparse_rows
from fastreid_u.reference import batch_hard_triplet as reference_triplet
from fastreid_u.reference import segment_attention as reference_attention
from fastreid_u.reference import segments as reference_segments

N = 40
rng = np.random.default_rng(0)
X = (rng.normal(size=(4, 8))[np.arange(N) % 4] + 0.3 * rng.normal(size=(N, 8))).astype(np.float32)
UNIT = X / np.linalg.norm(X, axis=1, keepdims=True)
LABELS = np.arange(N) % 4
TIGHT = np.arange(N) % 8
CAMERAS = np.arange(N) // 20
DISTANCE = np.square(X[:, None] - X).sum(-1) / 100
COUNTS = {"k1": 8, "k2": 3}


@pytest.fixture(autouse=True, params=["device", "dtype"])
def default(request):
    if request.param == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def from_numpy(array):
    return torch.from_numpy(np.array(array))


def as_lists(array):
    """Under a default dtype of float64 a list has float64: then an array."""
    return array.tolist() if torch.get_default_dtype() == torch.float32 else array


def backends(call, *names):
    return {name: (lambda x, ids, name=name: call(x, ids, name)) for name in names}


def averaged():
    networks = [nn.Linear(8, 4, device="cpu", dtype=torch.float32) for _ in "ab"]
    for network, rows in zip(networks, (X[:4], X[4:8]), strict=True):
        network.load_state_dict({"weight": from_numpy(rows), "bias": from_numpy(rows[:, 0])})
    return fastreid_u.ema_update_(*networks, 0.5).weight.detach()


def ranked(x, ids, cameras):
    return torch.tensor([fastreid_u.rank_metrics(x, x, ids, ids, cameras, cameras).mAP], device="cpu").float()


def by_kernels():
    """The label step's Triton kernels, interpreted where there is no GPU."""
    from fastreid_u.kernels.jaccard import jaccard
    from fastreid_u.kernels.k_reciprocal import k_reciprocal
    from fastreid_u.kernels.knn import knn

    x = from_numpy(X[:8]).to("cuda" if torch.cuda.is_available() else "cpu")
    return sparse_rows(*jaccard(*k_reciprocal(x, knn(x, 4)[1], 4, 2), 0.6)).cpu()


OPS = {
    "knn": backends(lambda x, i, b: fastreid_u.knn(x(X), 5, backend=b), "numba", "faiss", "reference"),
    "knn of a gallery": {"": lambda x, i: fastreid_u.knn(x(X), 5, gallery=x(X))},
    "k_reciprocal_encoding": backends(
        lambda x, i, b: fastreid_u.k_reciprocal_encoding(x(X), **COUNTS, backend=b), "numba", "reference"
    ),
    "jaccard_graph": backends(
        lambda x, i, b: fastreid_u.jaccard_graph(x(X), **COUNTS, backend=b), "numba", "reference"
    ),
    "jaccard_distance": backends(
        lambda x, i, b: fastreid_u.jaccard_distance(x(X), **COUNTS, backend=b), "numba", "reference"
    ),
    "pseudo_labels": backends(
        lambda x, i, b: fastreid_u.pseudo_labels(x(X), eps=[0.5, 0.6], **COUNTS, backend=b), "cpp", "reference"
    ),
    "suggest_eps": {"": lambda x, i: fastreid_u.suggest_eps(x(X), **COUNTS).core_distance},
    "infomap_labels": {"": lambda x, i: fastreid_u.infomap_labels(x(X))},
    "dbscan": backends(lambda x, i, b: fastreid_u.dbscan(x(DISTANCE), 0.1, backend=b), "cpp", "reference"),
    "DBSCAN": {"": lambda x, i: from_numpy(fastreid_u.DBSCAN(0.1).fit_predict(from_numpy(DISTANCE)))},
    "rank_metrics": {"": lambda x, i: ranked(x(X), i(LABELS), i(CAMERAS))},
    "reliable_clusters": {"": lambda x, i: fastreid_u.reliable_clusters(i(LABELS), i(TIGHT), i(LABELS // 2)).labels},
    "refine_clusters": backends(
        lambda x, i, b: fastreid_u.refine_clusters(x(X), i(LABELS), i(TIGHT), **COUNTS, backend=b),
        "numba", "reference",
    ),
    "refine_clusters of a graph": {
        "": lambda x, i: fastreid_u.refine_clusters(None, i(LABELS), i(TIGHT), graph=x(DISTANCE / DISTANCE.max()))
    },
    "cluster_centroids": backends(
        lambda x, i, b: fastreid_u.cluster_centroids(x(X), i(LABELS), backend=b), "reference"
    ),
    "proxy_centroids": {"": lambda x, i: fastreid_u.proxy_centroids(x(X), i(LABELS), i(CAMERAS))},
    "segment_sum": {"": lambda x, i: fastreid_u.segment_sum(x(X), i(LABELS))},
    "segment_mean": {"": lambda x, i: fastreid_u.segment_mean(x(X), i(LABELS), 6)},
    "neighbour_overlap": {"": lambda x, i: fastreid_u.neighbour_overlap(i(TIGHT[:, None]), i(LABELS[:, None]))},
    "segment_attention": {
        "": lambda x, i: fastreid_u.segment_attention(x(UNIT), x(UNIT), i(LABELS), heads=2),
        "reference": lambda x, i: reference_attention.segment_attention(
            from_numpy(UNIT), from_numpy(UNIT), from_numpy(LABELS), heads=2
        ),
    },
    "rerank": backends(lambda x, i, b: fastreid_u.rerank(x(X[:5]), x(X[5:]), backend=b), "numba", "reference"),
    "cluster_nce": backends(
        lambda x, i, b: fastreid_u.cluster_nce(x(UNIT), i(LABELS), x(UNIT[:4]), backend=b), "auto", "reference"
    ),
    "momentum_update_": backends(
        lambda x, i, b: fastreid_u.momentum_update_(from_numpy(UNIT[:4]), x(UNIT), i(LABELS), backend=b),
        "auto", "reference",
    ),
    "proxy_nce": backends(
        lambda x, i, b: fastreid_u.proxy_nce(
            x(UNIT), i(LABELS), i(CAMERAS), x(UNIT[:8]), i(TIGHT[:8] % 4), i(TIGHT[:8] // 4), backend=b
        ),
        "auto", "reference",
    ),
    "batch_hard_triplet": {
        "": lambda x, i: fastreid_u.batch_hard_triplet(x(X), i(LABELS)),
        "reference": lambda x, i: reference_triplet.batch_hard_triplet(from_numpy(X), from_numpy(LABELS)),
    },
    "cosine_align": {"": lambda x, i: fastreid_u.cosine_align(x(X), x(X), i(LABELS))},
    "hard_instance_nce": {"": lambda x, i: hard_instance_nce(*map(from_numpy, (X, X[::-1], LABELS)))},
    "consistency_kl": {"": lambda x, i: consistency_kl(*map(from_numpy, (X, X[::-1], X)))},
    "segments": {"reference": lambda x, i: reference_segments.segment_mean(from_numpy(X), from_numpy(LABELS))},
    "ema_update_": {"": lambda x, i: averaged()},
    "label step": {"triton": lambda x, i: by_kernels()},
}  # fmt: skip
CASES = [
    pytest.param(run, id=f"{op}-{backend}".strip("-")) for op, runs in OPS.items() for backend, run in runs.items()
]


def test_every_public_op_is_among_them():
    assert {name for name, home in fastreid_u._HOME.items() if home.startswith("ops.")} <= set(OPS)


def tensors(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


@contextlib.contextmanager
def torch_defaults():
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("given", [from_numpy, as_lists], ids=["tensor", "list"])
@pytest.mark.parametrize("run", CASES)
def test_ops_follow_their_inputs_whatever_the_defaults_are(request, run, given):
    if "infomap" in request.node.callspec.id and not _env.infomap().present:
        pytest.skip("needs infomap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tensors(run(given, given))
        with torch_defaults():
            expected = tensors(run(given, given))
    assert [each.device.type for each in found] == ["cpu"] * len(found)
    for each, right in zip(found, expected, strict=True):
        assert each.dtype == right.dtype
        assert torch.equal(each.to_dense(), right.to_dense())
