# SPDX-License-Identifier: Apache-2.0
"""The ops of the pseudo-label step on a GPU give what they give on a CPU."""

import os

import pytest
import torch

from fastreid_u.ops._dispatch import missing
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# one row, powers of two and their neighbours, sizes past a buffer, a tile of products and a block of queries
SIZES = [1, 2, 63, 64, 65, 511, 513, 1000, 2049, 8191, 8193, 12_936]


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """What is expected comes from the CPU, at sizes for which one thread would take minutes of the GPU's time."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


def assert_same_neighbours(x, k, gallery=None):
    found = knn(x.cuda(), k, gallery=None if gallery is None else gallery.cuda(), backend="triton")
    expected = knn(x, k, gallery=gallery)
    assert found[0].is_cuda
    differ = (found[1].cpu() != expected[1]).nonzero()
    assert len(differ) == 0, f"{len(differ)} entries differ, first at {differ[0].tolist()}"
    # both round one float64 sum; sums in another order may fall on the other side of a float32 once in a while
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=0, rtol=1.2e-7)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("d", "k"), [(64, 30), (200, 5)])
def test_knn(clustered, n, d, k):
    assert_same_neighbours(clustered(n, d, number=n), min(k, n))


@pytest.mark.parametrize(("n", "m", "d", "k"), [(100, 9000, 128, 10), (9000, 100, 33, 100), (3000, 20_000, 2048, 20)])
def test_knn_in_a_gallery(clustered, n, m, d, k):
    assert_same_neighbours(clustered(n, d), k, clustered(m, d, number=1))


@pytest.mark.parametrize("case", ["sorted", "copies", "all copies", "common mean", "rows of all sizes"])
def test_knn_of_hard_data(clustered, case):
    x = clustered(3000, 48)
    if case == "sorted":
        x = x[(x @ x[0]).argsort()]
    elif case == "copies":
        x[500:900] = x[3]
    elif case == "all copies":
        x = x[:1].repeat(2000, 1)
    elif case == "common mean":
        x = x * 1e-3 + 1
    else:
        x = x * 10 ** torch.linspace(-3, 3, 3000)[:, None]
    assert_same_neighbours(x, 30)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 1), (25, 8), (100, 6)])
@pytest.mark.parametrize("n", [1, 2, 65, 1000, 5000])
def test_encoding(clustered, n, k1, k2, compat):
    k1, k2 = min(k1, n), min(k2, n)
    x = clustered(n, 64, number=n) * torch.linspace(0.8, 1.2, n)[:, None]
    near = knn(x, k1)
    found = k_reciprocal_encoding(
        x.cuda(), k1, k2, knn=(near[0].cuda(), near[1].cuda()), compat=compat, backend="triton"
    ).cpu()
    expected = k_reciprocal_encoding(x, k1, k2, knn=near, compat=compat)
    assert torch.equal(found.crow_indices(), expected.crow_indices())
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_graph(clustered, n, radius):
    """Bit for bit the CPU's: both add the same integers, unless a float64 softmax was rounded another way."""
    k1, k2 = min(30, n), min(6, n)
    x = clustered(n, 64, number=n)
    near = knn(x, k1)
    found = jaccard_graph(
        x.cuda(), k1=k1, k2=k2, radius=radius, knn=(near[0].cuda(), near[1].cuda()), backend="triton"
    ).cpu()
    expected = jaccard_graph(x, k1=k1, k2=k2, radius=radius, knn=near, backend="numba")
    assert torch.equal(found.crow_indices(), expected.crow_indices())
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-7, rtol=0)


def test_graph_is_bitwise_symmetric_and_repeatable(clustered):
    x = clustered(4000, 32, spread=1.2).cuda()
    graphs = [jaccard_graph(x, radius=0.9, backend="triton") for _ in range(3)]
    assert all(torch.equal(graph.values(), graphs[0].values()) for graph in graphs)
    row = torch.arange(4000, device="cuda").repeat_interleave(graphs[0].crow_indices().diff())
    order = (graphs[0].col_indices() * 4000 + row).argsort()
    assert torch.equal(graphs[0].values()[order], graphs[0].values())


@pytest.mark.parametrize("case", ["all copies", "hub"])
def test_graph_of_collapsed_data(clustered, case):
    x = clustered(1500, 32)
    x = x[:1].repeat(1500, 1) if case == "all copies" else torch.nn.functional.normalize(x + 3)
    found = jaccard_graph(x.cuda(), radius=0.6, backend="triton").cpu()
    expected = jaccard_graph(x, radius=0.6, backend="numba")
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-7, rtol=0)


def test_golden(golden):
    file = golden("jaccard_n600_d256")
    found = jaccard_distance(file.tensor("features").cuda(), 30, 6, backend="triton").cpu()
    torch.testing.assert_close(found, torch.from_numpy(file.matrix("dist_k30_6")), atol=2e-6, rtol=0)


@pytest.mark.parametrize("n", [20_000, 40_000])
def test_no_square_of_the_rows(clustered, n):
    """Peak memory stays far below N x N, and below a stated number of bytes a row."""
    x = clustered(n, 64).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    jaccard_graph(x, radius=0.6, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 500e6 + 20_000 * n


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(missing(name) is not None, reason=str(missing(name))))
    for name in ("cuda", "cupy")
]


@pytest.mark.filterwarnings("ignore:.*clipped to them")
@pytest.mark.parametrize("n", [1, 2, 65, 1000, 5000])
def test_pseudo_labels(clustered, n):
    x = clustered(n, 128, number=n)
    expected = pseudo_labels(x, eps=[0.4, 0.6])
    assert torch.equal(pseudo_labels(x.cuda(), eps=[0.4, 0.6], backend="triton").cpu(), expected)
    assert torch.equal(pseudo_labels(x.cuda(), eps=0.6).cpu(), expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("min_samples", [1, 4, 25])
@pytest.mark.parametrize("spread", [0.6, 1.2, 2.0])
@pytest.mark.parametrize("n", [65, 1000, 12_936])
def test_pseudo_labels_without_a_graph(clustered, n, spread, min_samples, backend):
    """Of the CPU's own neighbour lists, so that only the clustering and its encoding may differ."""
    x = clustered(n, 64, number=n, spread=spread)
    near = knn(x, 30)
    options = {"eps": [0.3, 0.6, 0.75], "min_samples": min_samples}
    found = pseudo_labels(x.cuda(), knn=tuple(part.cuda() for part in near), backend=backend, **options)
    assert found.is_cuda
    assert torch.equal(found.cpu(), pseudo_labels(x, knn=near, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["all copies", "fifth copies", "hub"])
def test_pseudo_labels_of_collapsed_data_in_memory_of_o_n(clustered, case, backend):
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [33, 257, 8001])
def test_labels_do_not_depend_on_the_order_of_atomics(clustered, n, backend):
    x = clustered(n, 32, number=n, spread=1.5)
    near = knn(x, 30)
    expected = pseudo_labels(x, eps=[0.5, 0.7], knn=near, backend="cpp")
    near = tuple(part.cuda() for part in near)
    for _ in range(5):
        assert torch.equal(pseudo_labels(x.cuda(), eps=[0.5, 0.7], knn=near, backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_rows_that_start_anywhere_in_memory(clustered, backend):
    x = clustered(999, 33)
    memory = torch.full((1 + x.numel(),), torch.nan, device="cuda")
    memory[1:] = x.flatten().cuda()
    assert torch.equal(pseudo_labels(memory[1:].view(999, 33), backend=backend).cpu(), pseudo_labels(x))


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("case", ["unit", "one sign", "large first", "long"])
def test_tensor_cores_stay_within_the_bound(clustered, record_property, case):
    """What no CPU shows: the additions within the product of float16 rows, which may cut off instead of rounding.

    The exact search rests on this bound: where it fails, a neighbour may be missed and nobody would see it.
    """
    from fastreid_u.kernels import knn as kernel

    n, d = 1000, {"long": 16_384}.get(case, 2048)
    x = clustered(n, d)
    if case != "unit":  # the products of two rows all have one sign, so what is cut off adds up
        x = (torch.arange(n) % 2 * 2 - 1)[:, None] * (1 + 0.1 * x)
    if case == "large first":
        x[:, 1:] *= 1e-2
    x = x.cuda()
    find = kernel._Search(x, x, 30)
    score = torch.empty(n, n, device="cuda")
    kernel._product(find.gallery, find.gallery, score)
    length = find._centred(x[find.order])[1]
    slack = (length + find.tiny)[:, None] * find.slack.double() + find.curve * find.slack.double() ** 2
    exact = ((x.double() - find.mean.double()) * find.scale)[find.order]
    exact = exact @ exact.T - exact.square().sum(1) / 2
    error = (score.double() + find.lift.double() - find.curve * find.slack.double() ** 2 - exact).abs()
    share = (error / slack).max().item()
    record_property("share of the bound", share)
    print(f"{case}: at most {share:.3f} of the bound")
    assert share <= 1


def test_means_are_divided_as_on_a_cpu():
    """torch on a GPU divides by a number by multiplying with its rounded reciprocal; the published mean is divided."""
    from fastreid_u.kernels import k_reciprocal as kernel

    generator = torch.Generator().manual_seed(0)
    crow, col = torch.arange(0, 4001, 4), torch.arange(4).repeat(1000).int()
    mass, lists = torch.rand(4000, generator=generator), torch.randint(1000, (1000, 6), generator=generator)
    parts = crow, col, mass, lists
    expected = kernel._average_rows(*parts)
    for found, part in zip(kernel._average_rows(*(part.cuda() for part in parts)), expected, strict=True):
        assert torch.equal(found.cpu(), part)


def test_triton_on_another_stream(clustered):
    """Features written there just before are seen, and nothing is handed back before it is read."""
    x = clustered(3000, 32)
    expected = jaccard_graph(x, radius=0.6)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(3000, 32, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = jaccard_graph(late, radius=0.6, backend="triton")
    stream.synchronize()
    assert torch.equal(found.crow_indices().cpu(), expected.crow_indices())
    assert torch.equal(found.col_indices().cpu(), expected.col_indices())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_triton_on_a_device_that_is_not_the_current_one(clustered):
    x = clustered(1000, 32)
    expected = jaccard_graph(x, radius=0.6)
    with torch.cuda.device(0):
        found = jaccard_graph(x.to("cuda:1"), radius=0.6, backend="triton")
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.col_indices().cpu(), expected.col_indices())


def test_addresses_past_two_to_the_31():
    """1,048,640 rows of 2048 numbers: their offsets do not fit into 32 bits."""
    from fastreid_u.kernels.k_reciprocal import bits, k_reciprocal

    need = 40e9
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of free memory on the GPU")
    n, d, last = 2**20 + 64, 2048, 32
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, d, device="cuda", generator=generator).mul_(0.02)
    query = x[-last:] + 0.001 * torch.randn(last, d, device="cuda", generator=generator)
    index = knn(query, 5, gallery=x, backend="triton")[1]
    parts, wide = x.split(2**16), query.double()
    exact = torch.cat(
        [(wide.square().sum(1)[:, None] + y.double().square().sum(1) - 2 * wide @ y.double().T) for y in parts], dim=1
    )
    assert index[:, 0].tolist() == list(range(n - last, n))
    assert torch.equal(index, exact.topk(5, largest=False).indices)

    pair = torch.arange(n, device="cuda")
    crow, col, mass, total = k_reciprocal(x, torch.stack([pair, pair ^ 1], dim=1), 2, 1)
    assert total == 1 << bits(1)
    assert torch.equal(col[-2:].long(), pair[-2:])
    far = (-(x[-1].double() - x[-2].double()).square().sum()).exp()
    assert abs(mass[-1].item() - (total / (1 + far)).round().item()) <= 1
    assert crow[-1] == 2 * n


@pytest.mark.parametrize("backend", BACKENDS)
def test_dbscan_on_another_stream_of_a_graph_that_starts_anywhere_in_memory(clustered, backend):
    graph = jaccard_graph(clustered(2999, 32), radius=0.7)
    crow, col, values = (part.cuda() for part in (graph.crow_indices(), graph.col_indices(), graph.values()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        memory = torch.full((1 + len(values),), torch.nan, device="cuda")  # an error, if it is read too early
        torch.cuda._sleep(50_000_000)
        memory[1:] = values
        late = torch.sparse_csr_tensor(crow, col, memory[1:], size=graph.shape)
        found = dbscan(late, [0.5, 0.6], backend=backend)
    stream.synchronize()
    assert torch.equal(found.cpu(), dbscan(graph, [0.5, 0.6], backend="cpp"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_on_a_device_that_is_not_the_current_one(clustered, backend):
    x = clustered(999, 32)
    found = pseudo_labels(x.to("cuda:1"), backend=backend)
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), pseudo_labels(x))
    graph = jaccard_graph(x, radius=0.7)
    assert torch.equal(dbscan(graph.to("cuda:1"), 0.6, backend=backend).cpu(), dbscan(graph, 0.6, backend="cpp"))
    assert torch.cuda.current_device() == 0
