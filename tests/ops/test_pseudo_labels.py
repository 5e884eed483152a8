# SPDX-License-Identifier: Apache-2.0
"""Features to labels, end to end."""

import numpy as np
import pytest
import torch

from fastreid_u.ops._dispatch import missing
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels

EPS = ["0.40", "0.45", "0.50", "0.55", "0.60", "0.65", "0.70"]


@pytest.mark.parametrize("name", ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"])
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6), (30, 1), (10, 3)])
def test_golden(golden, device, name, k1, k2):
    file = golden(name)
    record = file.meta["params"]["dbscan"][f"k{k1}_{k2}"]
    stable = [eps for eps in EPS if record[eps]["labels_stable_under_eps_pm_4e_6"]]
    assert len(stable) >= 3, "the file should be able to test something"
    for eps in stable:
        labels = pseudo_labels(file.tensor("features").to(device), eps=float(eps), k1=k1, k2=k2)
        np.testing.assert_array_equal(labels.cpu().numpy(), file[f"labels_k{k1}_{k2}_eps{eps}"], err_msg=f"eps {eps}")


def test_golden_one_tight_cluster(golden):
    file = golden("jaccard_edge_tight")
    outcomes = [name for name in file if name.startswith("labels_")]
    assert len(outcomes) == 4
    for name in outcomes:  # labels_k30_6_eps0.60
        counts, eps = name.removeprefix("labels_k").split("_eps")
        k1, k2 = map(int, counts.split("_"))
        labels = pseudo_labels(file.tensor("features"), eps=float(eps), k1=k1, k2=k2)
        np.testing.assert_array_equal(labels.numpy(), file[name], err_msg=name)


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.6, 0.75])
def test_is_its_parts_put_together(clustered, eps):
    x = clustered(180, 24, spread=0.9)
    labels = pseudo_labels(x, eps=eps, min_samples=3, k1=15, k2=4)
    assert torch.equal(labels, dbscan(jaccard_graph(x, k1=15, k2=4), eps, 3))


def test_finds_separated_identities():
    centre = torch.eye(6)
    x = centre.repeat_interleave(20, 0) + 0.02 * torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    labels = pseudo_labels(x, k1=15)
    assert torch.equal(labels, torch.arange(6).repeat_interleave(20))


def test_all_noise():
    x = torch.randn(60, 400, generator=torch.Generator().manual_seed(1))
    assert (pseudo_labels(x, eps=0.05, k1=10) == -1).all()


def test_zero_rows_form_one_cluster(clustered):
    x = clustered(90, 16)
    x[::9] = 0
    labels = pseudo_labels(x, k1=10, k2=1)
    assert len(set(labels[::9].tolist())) == 1
    assert labels[0] >= 0


def test_collapsed_features_are_one_cluster():
    assert (pseudo_labels(torch.ones(70, 8)) == 0).all()


def test_shape_type_and_small_inputs(clustered):
    labels = pseudo_labels(clustered(33, 8).numpy())
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (33,))
    assert tuple(pseudo_labels(torch.zeros(0, 8)).shape) == (0,)
    with pytest.warns(UserWarning, match="pseudo_labels: k1=30, k2=6 is more than the 1 rows") as caught:
        assert pseudo_labels(torch.ones(1, 8)).tolist() == [-1]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, r"pseudo_labels: eps must lie in \(0, 1\), got 0"),
        ({"eps": 1.0}, r"pseudo_labels: eps must lie in \(0, 1\), got 1.0"),
        ({"min_samples": 0}, "pseudo_labels: min_samples must be at least 1, got 0"),
        ({"k2": 0}, r"pseudo_labels: k2 must be at least 1, got 0"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels(torch.eye(40), **options)


def test_rejects_nan():
    x = torch.ones(40, 3)
    x[12:15, 0] = torch.nan
    with pytest.raises(ValueError, match=r"pseudo_labels: x must be finite, .* 3 of 40 rows \(first: row 12\)"):
        pseudo_labels(x)


# on a GPU, against what a CPU gives


GPU_BACKENDS = [
    pytest.param(
        name, marks=[pytest.mark.gpu, pytest.mark.skipif(missing(name) is not None, reason=str(missing(name)))]
    )
    for name in ("cuda", "cupy")
]


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.filterwarnings("ignore:.*clipped to them")
@pytest.mark.parametrize("n", [1, 2, 65, 1000, 5000])
def test_gpu_gives_what_a_cpu_gives(clustered, n):
    x = clustered(n, 128, number=n)
    expected = pseudo_labels(x, eps=[0.4, 0.6])
    assert torch.equal(pseudo_labels(x.cuda(), eps=[0.4, 0.6], backend="triton").cpu(), expected)
    assert torch.equal(pseudo_labels(x.cuda(), eps=0.6).cpu(), expected[1])


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("min_samples", [1, 4, 25])
@pytest.mark.parametrize("spread", [0.6, 1.2, 2.0])
@pytest.mark.parametrize("n", [65, 1000, 12_936])
def test_gpu_without_a_graph(clustered, n, spread, min_samples, backend):
    """Of the CPU's own neighbour lists, so that only the clustering and its encoding may differ."""
    x = clustered(n, 64, number=n, spread=spread)
    near = knn(x, 30)
    options = {"eps": [0.3, 0.6, 0.75], "min_samples": min_samples}
    found = pseudo_labels(x.cuda(), knn=tuple(part.cuda() for part in near), backend=backend, **options)
    assert found.is_cuda
    assert torch.equal(found.cpu(), pseudo_labels(x, knn=near, **options))


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("case", ["all copies", "fifth copies", "hub"])
def test_gpu_of_collapsed_data_in_memory_of_o_n(clustered, case, backend):
    """The graph of 40,000 copies would take 19 GB."""
    x = clustered(40_000, 32)
    if case == "all copies":
        x = x[:1].repeat(40_000, 1)
    elif case == "fifth copies":
        x[::5] = x[0]
    else:
        x = torch.nn.functional.normalize(x + 3)
    near = tuple(part.cuda() for part in knn(x, 30))
    x = x.cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = pseudo_labels(x, knn=near, backend=backend)
    assert torch.cuda.max_memory_allocated() - before < 600e6 + 5_000 * len(x)
    assert torch.equal(labels.cpu(), pseudo_labels(x.cpu(), knn=tuple(part.cpu() for part in near)))
    if case == "all copies":
        assert (labels == 0).all()


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("n", [33, 257, 8001])
def test_labels_do_not_depend_on_the_order_of_atomics(clustered, n, backend):
    x = clustered(n, 32, number=n, spread=1.5)
    near = knn(x, 30)
    expected = pseudo_labels(x, eps=[0.5, 0.7], knn=near, backend="cpp")
    near = tuple(part.cuda() for part in near)
    for _ in range(5):
        assert torch.equal(pseudo_labels(x.cuda(), eps=[0.5, 0.7], knn=near, backend=backend).cpu(), expected)


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_labels_of_rows_that_start_anywhere_in_memory(clustered, backend):
    x = clustered(999, 33)
    memory = torch.full((1 + x.numel(),), torch.nan, device="cuda")
    memory[1:] = x.flatten().cuda()
    assert torch.equal(pseudo_labels(memory[1:].view(999, 33), backend=backend).cpu(), pseudo_labels(x))


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_labels_on_another_stream(clustered, backend):
    """The kernels follow torch's current stream: features written there just before are seen."""
    x = clustered(3000, 32)
    near = tuple(part.cuda() for part in knn(x, 30))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(3000, 32, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = pseudo_labels(late, knn=near, backend=backend)
    stream.synchronize()
    assert torch.equal(found.cpu(), pseudo_labels(x))


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_labels_on_a_device_that_is_not_the_current_one(clustered, backend):
    x = clustered(999, 32)
    found = pseudo_labels(x.to("cuda:1"), backend=backend)
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), pseudo_labels(x))
    graph = jaccard_graph(x, radius=0.7)
    assert torch.equal(dbscan(graph.to("cuda:1"), 0.6, backend=backend).cpu(), dbscan(graph, 0.6, backend="cpp"))
    assert torch.cuda.current_device() == 0
