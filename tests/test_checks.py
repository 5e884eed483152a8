# SPDX-License-Identifier: Apache-2.0
"""The named checks, by themselves and in the ops."""

import math
import re

import numpy as np
import pytest
import torch

import fastreid_u
from fastreid_u import _checks as checks


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6.0).reshape(2, 3)[::-1],
        np.arange(6, dtype=">f4"),
        np.arange(6, dtype=np.longdouble),
        np.array([(1, 2.0), (3, 4.0)], dtype=[("label", "i4"), ("score", "f8")])["score"],
        np.frombuffer(bytes(9), np.int64, offset=1),
        [[1, 2], [3, 4]],
        [np.arange(3.0), np.ones(3)],
        (np.array(1), np.array(2)),
        range(5),
    ],
)
@pytest.mark.filterwarnings("error")
def test_as_tensor_keeps_the_numbers(x):
    np.testing.assert_array_equal(checks.as_tensor("op", "x", x).numpy(), np.asarray(x))


def test_as_tensor_shares_memory_where_it_can():
    array = np.zeros(3, np.float32)
    checks.as_tensor("op", "x", array)[1] = 5
    assert array[1] == 5
    tensor = torch.zeros(2)
    assert checks.as_tensor("op", "x", tensor) is tensor


def test_as_tensor_copies_read_only_arrays():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    checks.as_tensor("op", "x", array)[1] = 5
    assert array[1] == 0


@pytest.mark.parametrize(
    "x",
    [
        None, "abc", {1, 2}, object(), [[1, 2], [3]], ["a"], np.array(["a"]), np.array([None]),
        [np.ones(2), np.ones(3)], [np.array(["a"])],
    ],
)  # fmt: skip
def test_as_tensor_names_what_it_cannot_take(x):
    with pytest.raises(TypeError, match="op: x must "):
        checks.as_tensor("op", "x", x)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (0.0, {"open_low": True}, r"op: eps must lie in \(0, 1\], got 0.0"),
        (1.0, {"open_high": True}, r"op: eps must lie in \[0, 1\), got 1.0"),
        (-0.1, {}, r"op: eps must lie in \[0, 1\], got -0.1"),
        (float("nan"), {}, r"op: eps must lie in \[0, 1\], got nan"),
    ],
)
def test_range_names_its_interval(value, options, message):
    with pytest.raises(ValueError, match=message):
        checks.require_in_range("op", "eps", value, 0, 1, **options)


def test_range_and_counts_return_plain_numbers():
    assert checks.require_in_range("op", "eps", np.float32(0.5), 0, 1) == 0.5
    assert type(checks.require_positive_int("op", "k", np.int64(3))) is int
    assert checks.require_positive("op", "t", 2) == 2.0


@pytest.mark.parametrize("value", [True, 2.0, "3", None])
def test_counts_are_whole_numbers(value):
    with pytest.raises(TypeError, match="op: k must be an integer, got"):
        checks.require_positive_int("op", "k", value)


@pytest.mark.parametrize("value", [True, "0.5", None, 1j])
def test_reals_are_real(value):
    with pytest.raises(TypeError, match="op: t must be a real number, got"):
        checks.require_positive("op", "t", value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_positive_is_positive_and_finite(value):
    with pytest.raises(ValueError, match="op: t must be positive and finite, got"):
        checks.require_positive("op", "t", value)


def test_choice_lists_the_choices():
    assert checks.require_choice("op", "mode", "a", ("a", "b")) == "a"
    for wrong in ("c", None, ["a"]):
        with pytest.raises(ValueError, match="op: mode must be one of 'a', 'b', got"):
            checks.require_choice("op", "mode", wrong, ("a", "b"))


def test_dense_and_integer():
    graph = torch.eye(2).to_sparse()
    with pytest.raises(TypeError, match=r"op: x must be dense, got torch\.sparse_coo"):
        checks.require_2d("op", "x", graph)
    with pytest.raises(TypeError, match=r"op: y must hold integers, got torch\.bool"):
        checks.require_integer("op", "y", torch.tensor([True]))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_ids_become_int64(dtype):
    ids = checks.require_ids("op", "y", torch.tensor([0, 100]).to(dtype))
    assert (ids.dtype, ids.tolist()) == (torch.int64, [0, 100])


def test_features_are_not_of_8_bits():
    with pytest.raises(TypeError, match="op: x must be floating point of 16 bits or more"):
        checks.require_floating("op", "x", torch.ones(2).to(torch.float8_e5m2))


def test_values_in_skips_the_ignored():
    targets = torch.tensor([0, -1, 4])
    assert checks.require_values_in("op", "y", targets, 0, 5, ignore=-1) is targets
    with pytest.raises(ValueError, match=r"op: y must lie in \[0, 4\), got 4"):
        checks.require_values_in("op", "y", targets, 0, 4, ignore=-1)


def test_device_values_are_read_only_on_request(monkeypatch):
    class OnGPU:
        device = torch.device("cuda")

    assert not checks.may_read(OnGPU)
    monkeypatch.setenv("FASTREID_U_CHECK", "1")
    assert checks.may_read(OnGPU)


def test_different_devices():
    with pytest.raises(ValueError, match="op: y must be on cpu like x, got meta"):
        checks.require_same_device("op", "y", torch.zeros(1, device="meta"), "x", torch.zeros(1))


@pytest.mark.parametrize(
    ("values", "message"), [([0.5, 1.5], "got 1.5"), ([-0.5, 1.0], "got -0.5"), ([0.5, float("nan")], "got nan")]
)
def test_reals_in_an_interval(values, message):
    with pytest.raises(ValueError, match=rf"op: share must lie in \[0, 1\], {message}"):
        checks.require_reals_in("op", "share", torch.tensor(values), 0, 1)
    fine = torch.tensor([0.0, 1.0])
    assert checks.require_reals_in("op", "share", fine, 0, 1) is fine
    checks.require_reals_in("op", "share", fine[:0], 0, 1)


def test_marked_indices():
    mask, index = torch.tensor([True, False, True]), torch.tensor([0, 2, -1, 1])
    with pytest.raises(ValueError, match="op: targets must be True in class_mask, got 1"):
        checks.require_marked("op", "targets", index, "class_mask", mask, ignore=-1)
    checks.require_marked("op", "targets", index[:3], "class_mask", mask, ignore=-1)


def too_long_for_float32():
    x = torch.randn(6, 3, dtype=torch.float64)
    x[2, 0] = 1e200
    return x


of_features = pytest.mark.parametrize(
    "op",
    [
        lambda x: fastreid_u.knn(x, 3),
        lambda x: fastreid_u.k_reciprocal_encoding(x),
        lambda x: fastreid_u.jaccard_graph(x),
        lambda x: fastreid_u.jaccard_distance(x),
        lambda x: fastreid_u.pseudo_labels(x),
        lambda x: fastreid_u.suggest_eps(x),
        lambda x: fastreid_u.infomap_labels(x),
        lambda x: fastreid_u.refine_clusters(x, [0] * 6, [0, 1] * 3),
        lambda x: fastreid_u.cluster_centroids(x, [0] * 6),
        lambda x: fastreid_u.proxy_centroids(x, [0] * 6, [0] * 6),
        lambda x: fastreid_u.rank_metrics(x, x, [0] * 6, [0] * 6),
        lambda x: fastreid_u.rerank(x, x),
    ],
    ids=[
        "knn", "k_reciprocal_encoding", "jaccard_graph", "jaccard_distance", "pseudo_labels", "suggest_eps",
        "infomap_labels", "refine_clusters", "cluster_centroids", "proxy_centroids", "rank_metrics", "rerank",
    ],
)  # fmt: skip


@of_features
def test_rows_whose_squares_float32_cannot_hold_are_refused_by_name(op, request):
    """They were ranked by index, without a word."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    x[4] *= 1e20
    expected = f"^{request.node.callspec.id}: (x|query) must have no row longer than .*, got length .*e.20 in 1 of 6"
    with pytest.raises(ValueError, match=expected + r" rows \(first: row 4\)"):
        op(x)


def test_memories_refuse_rows_whose_squares_float32_cannot_hold():
    x = torch.full((6, 3), 1e20)
    for make in (
        fastreid_u.ClusterMemory.from_centroids,
        fastreid_u.InstanceMemory.from_features,
        lambda rows: fastreid_u.ProxyMemory.from_features(rows, [0, 1] * 3, [0] * 6),
    ):
        with pytest.raises(ValueError, match="must have no row longer than"):
            make(x)


@pytest.mark.parametrize("exponent", [-40, 0, 40, 60])
@pytest.mark.parametrize("backend", ["numba", "faiss", "reference"])
def test_rows_of_any_length_up_to_there_are_ranked_alike(backend, exponent):
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    index = fastreid_u.knn(x * 2.0**exponent, 9, backend=backend)[1]
    assert torch.equal(index, fastreid_u.knn(x, 9)[1])


def test_the_longest_row_may_have_its_length_in_one_column_or_in_all():
    one, all_columns = torch.zeros(2, 16), torch.zeros(2, 16)
    one[0, 3], all_columns[0] = 2.0**63, 2.0**61
    for x in (one, all_columns):
        assert torch.equal(checks.require_features("op", "x", x), x)
        with pytest.raises(ValueError, match=r"op: x must have no row longer .* 1 of 2 rows \(first: row 0\)"):
            checks.require_features("op", "x", x * 1.001)


@pytest.mark.parametrize(
    ("op", "run"),
    [
        ("cluster_centroids", lambda labels: fastreid_u.cluster_centroids(torch.eye(4), labels)),
        ("proxy_centroids", lambda labels: fastreid_u.proxy_centroids(torch.eye(4), labels, [0, 1, 0, 1])),
        ("segment_sum", lambda labels: fastreid_u.segment_sum(torch.eye(4), labels)),
        ("segment_mean", lambda labels: fastreid_u.segment_mean(torch.eye(4), labels)),
        ("reliable_clusters", lambda labels: fastreid_u.reliable_clusters(labels, labels, labels)),
        ("refine_clusters", lambda labels: fastreid_u.refine_clusters(torch.eye(4), labels, labels, k1=3)),
    ],
)
def test_noise_marked_by_the_largest_int32_is_refused_by_name(op, run):
    """Memory was asked for up to the largest label: 16 GiB and more."""
    with pytest.raises(ValueError, match=rf"{op}: labels must lie in \[-1, \d+\), got 2147483647"):
        run([0, 1, 2147483647, 0])


def test_cluster_numbers_may_have_gaps():
    assert fastreid_u.cluster_centroids(torch.eye(4), [0, 7, 99_999, -1]).shape == (100_000, 4)


@of_features
def test_float64_beyond_float32_is_refused_by_name(op, request):
    name = request.node.callspec.id
    expected = f"^{name}: (x|query) must have no row longer than .*, got length 1e.200 in 1 of 6 rows .first: row 2"
    with pytest.raises(ValueError, match=expected):
        op(too_long_for_float32())
    both = too_long_for_float32()
    both[4, 1] = torch.nan
    with pytest.raises(ValueError, match=f"^{name}: (x|query) must be finite, got NaN or infinity in 1 of 6 rows"):
        op(both)


def test_the_length_of_rows_whose_squares_float64_cannot_hold_is_given():
    for rows in (torch.full((20, 4), 1e300, dtype=torch.float64), np.full((20, 4), -1e300)):
        with pytest.raises(ValueError, match=r"op: x must have no row longer than .*, got length 2e\+300 in 20 of 20"):
            checks.require_features("op", "x", rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_do_not_follow_the_default_dtype(dtype):
    x, lists = torch.randn(12, 4), torch.arange(12).reshape(4, 3)

    def outcome():
        return [
            fastreid_u.jaccard_distance(x, 4, 2),
            fastreid_u.rerank(x[:5], x[5:], 3, 2),
            fastreid_u.rerank(x[:5], x[5:], 3, 2, top=2)[0],
            fastreid_u.neighbour_overlap(lists, lists),
            fastreid_u.cluster_centroids(x, [0, 1] * 6),
        ]

    wanted = outcome()
    torch.set_default_dtype(dtype)
    try:
        found = outcome()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_results_do_not_follow_the_default_device():
    x = torch.randn(12, 4)
    torch.set_default_device("meta")
    try:
        graph, distance = fastreid_u.jaccard_graph(x, k1=4, k2=2), fastreid_u.jaccard_distance(x, 4, 2)
    finally:
        torch.set_default_device(None)
    assert graph.device == distance.device == x.device


@pytest.mark.parametrize(
    ("eps", "shape"), [(np.array(0.6), (40,)), (torch.tensor(0.6), (40,)), (torch.tensor([0.6, 0.5]), (2, 40))]
)
def test_eps_from_arrays(eps, shape):
    x = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    assert fastreid_u.pseudo_labels(x, eps=eps, k1=8, k2=3).shape == shape
    assert fastreid_u.dbscan(fastreid_u.jaccard_distance(x, 8, 3), eps).shape == shape


@pytest.mark.parametrize("value", [None, np.True_, object()], ids=str)
def test_what_is_no_number_is_named(value):
    for call, name in (
        (lambda: fastreid_u.dbscan(torch.zeros(3, 3), value), "dbscan: eps"),
        (lambda: fastreid_u.pseudo_labels(torch.eye(3), eps=value), "pseudo_labels: eps"),
        (lambda: fastreid_u.suggest_eps(torch.eye(3), grid=value), "suggest_eps: grid"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a real number or a sequence of them"):
            call()


def test_a_changing_temperature_compiles_whole():
    memory, targets = torch.nn.functional.normalize(torch.randn(5, 6), dim=1), torch.tensor([0, 1, 2, 3])
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(
        lambda x, t: fastreid_u.cluster_nce(x, targets, memory, temperature=t), fullgraph=True, backend="eager"
    )
    for temperature in (0.05, 0.06, 0.07):
        torch.testing.assert_close(
            compiled(x, temperature), fastreid_u.cluster_nce(x, targets, memory, temperature=temperature)
        )
    with pytest.raises(ValueError, match="temperature must be positive and finite, got nan"):
        fastreid_u.cluster_nce(x, targets, memory, temperature=math.nan)


@pytest.mark.parametrize("value", ["0.5", b"0.5", np.array("0.5"), {0.5: 1}, {0.5}, None, [[0.5, 0.6]]], ids=repr)
def test_one_or_several_numbers_are_no_text_and_no_unordered_collection(value):
    """A string was read letter by letter."""
    shown = re.escape(repr(value.tolist() if isinstance(value, np.ndarray) else value))
    x = torch.eye(40)
    for op, name, run in (
        ("pseudo_labels", "eps", lambda: fastreid_u.pseudo_labels(x, eps=value)),
        ("dbscan", "eps", lambda: fastreid_u.dbscan(x, value)),
        ("suggest_eps", "grid", lambda: fastreid_u.suggest_eps(x, grid=value)),
    ):
        with pytest.raises(TypeError, match=f"^{op}: {name} must be a real number or a sequence of them, got {shown}$"):
            run()
