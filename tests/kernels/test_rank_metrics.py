# SPDX-License-Identifier: Apache-2.0
"""The Triton counts behind ``rank_metrics``: on a GPU if there is one, else interpreted, so on few rows.

Everything here is equality: counts are integers and have one right value.
"""

import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this platform")

from fastreid_u.kernels import rank_metrics as kernels

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rounded(distance):
    """To 24 significant bits, half to even: float32's mantissa with float64's exponent."""
    mantissa, exponent = distance.frexp()
    return torch.ldexp((mantissa * 2.0**24).round(), exponent - 24)


def all_distances(query, gallery):
    """Every pair as ``measure`` gives it, which has a test of its own."""
    row = torch.arange(len(query)).repeat_interleave(len(gallery)).to(DEVICE)
    column = torch.arange(len(gallery)).repeat(len(query)).to(DEVICE)
    return kernels.measure(query.to(DEVICE), gallery.to(DEVICE), row, column).cpu().view(len(query), len(gallery))


def marks_at(distance, chosen):
    """The entries of ``chosen`` (Q, G), in each query ascending by (distance, column)."""
    row, column = chosen.nonzero(as_tuple=True)
    value = distance[row, column].double()
    order = value.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    start = torch.nn.functional.pad(row.bincount(minlength=len(distance)).cumsum(0), (1, 0))
    return start, row[order], column[order], value[order]


def expected_counts(distance, row, column, value):
    mine = distance[row].double()
    place = torch.arange(distance.shape[1])
    less, equal = mine < value[:, None], mine == value[:, None]
    before = less | (equal & (place < column[:, None]))
    return less.sum(1), before.sum(1), (less | equal).sum(1)


def assert_counts(query, gallery, chosen, beyond=()):
    """``beyond``: (query, distance) of more marks, behind all rows of their distance."""
    distance = all_distances(query, gallery)
    start, row, column, value = marks_at(distance, chosen)
    for q, v in beyond:
        row, value = (torch.cat([part, torch.tensor([new])]) for part, new in ((row, q), (value, v)))
        column = torch.cat([column, torch.tensor([len(gallery)])])
    for key in (1, 2, 0):  # the last counts most
        order = (row, column, value)[key].argsort(stable=True)
        row, column, value = row[order], column[order], value[order]
    start = torch.nn.functional.pad(row.bincount(minlength=len(query)).cumsum(0), (1, 0))
    found = kernels.count(*(part.to(DEVICE) for part in (query, gallery, start, column, value)))
    for part, right in zip(found, expected_counts(distance, row, column, value), strict=True):
        assert part.dtype == torch.int64
        assert torch.equal(part.cpu(), right)


@pytest.fixture
def some():
    """``some(q, g, share)``: a random choice of pairs, as true matches are."""

    def choose(q, g, share=0.2):
        return torch.rand(q, g, generator=torch.Generator().manual_seed(q + g)) < share

    return choose


@pytest.fixture
def doubtful(monkeypatch):
    """How many rows of each tile were measured."""
    found, settle = [], kernels._rank_settle_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (found.append(int(args[3])), settle[grid](*args, **kwargs))

    monkeypatch.setattr(kernels, "_rank_settle_kernel", Recorder())
    return found


def test_measure_is_the_float64_sum_rounded(clustered):
    x, y = clustered(9, 300), clustered(11, 300, number=1)
    exact = (x.double()[:, None] - y.double()).square().sum(-1)
    torch.testing.assert_close(all_distances(x, y), rounded(exact), atol=0, rtol=1e-15)
    tiny = all_distances(x * 2.0**-100, y * 2.0**-100)  # below what float32 holds
    assert torch.equal(tiny, all_distances(x, y) * 2.0**-200)
    y[5:] = y[2]
    assert (all_distances(x, y)[:, 5:] == all_distances(x, y)[:, 2:3]).all()
    assert (all_distances(y, y).diagonal() == 0).all()


@pytest.mark.parametrize(("q", "g", "d"), [(1, 1, 1), (3, 70, 5), (13, 90, 33), (4, 40, 700)])
def test_counts(clustered, some, doubtful, q, g, d):
    x, y = clustered(q, d, number=q), clustered(g, d, number=g)
    assert_counts(x, y, some(q, g))
    if d == 33:  # a matching row is in doubt about its own mark; few others are
        assert some(q, g).sum() <= sum(doubtful) < 1.2 * some(q, g).sum()


def test_counts_in_tiles(clustered, some, monkeypatch):
    for name, size in (("_ROWS", 8), ("_TILE", (3, 32)), ("_CHUNK", 16), ("_ENTRIES", 100)):
        monkeypatch.setattr(kernels, name, size)
    assert_counts(clustered(11, 37), clustered(71, 37, number=1), some(11, 71, 0.1))


def test_queries_without_marks_cost_nothing(clustered, some, doubtful):
    chosen = some(8, 30)
    chosen[[0, 3, 4, 7]] = False
    assert_counts(clustered(8, 12), clustered(30, 12, number=1), chosen)
    assert len(doubtful) == 1
    doubtful.clear()
    assert_counts(clustered(8, 12), clustered(30, 12, number=1), torch.zeros_like(chosen))
    assert doubtful == []


def test_copies_tie_by_index(clustered, some, doubtful):
    y = clustered(60, 8)
    y[20:50] = y[7]
    x = torch.cat([y[7:8], y[:4], -y[7:8]])
    assert_counts(x, y, some(6, 60, 0.3))
    assert sum(doubtful) > 6 * 20


def test_all_rows_equal(some, doubtful):
    """Each row of a tile is in doubt: the list holds the tile."""
    assert_counts(torch.ones(3, 4), torch.ones(50, 4), some(3, 50))
    assert doubtful == [150]


def test_a_thousand_matches(clustered):
    y = clustered(1100, 6, number=1)
    y[100:200] = y[5]
    assert_counts(clustered(1, 6), y, torch.ones(1, 1100, dtype=torch.bool))


@pytest.mark.parametrize("case", ["common mean", "one far row", "tiny", "huge", "largest"])
def test_any_scale(clustered, some, case):
    x, y = clustered(5, 24), clustered(60, 24, number=1)
    scale = {"tiny": 1e-37, "huge": 1e30, "largest": 3e38}.get(case, 1)
    x, y = x * scale, y * scale
    if case == "common mean":
        x, y = x * 1e-3 + 300, y * 1e-3 + 300
    if case == "one far row":
        x, y = x * 1e-6, torch.cat([y[1:] * 1e-6, torch.full((1, 24), 1e3)])
    assert_counts(x, y, some(5, 60))


def test_marks_that_are_no_rows(clustered, some):
    x, y = clustered(4, 9), clustered(50, 9, number=1)
    y[30:40] = y[3]
    d = all_distances(x, y)
    levels = [(q, v) for q in (0, 2) for v in (0.0, d[q, 3].item(), d[q].max().item(), 9.0)]
    assert_counts(x, y, some(4, 50), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_in_a_matrix(some, dtype):
    generator = torch.Generator().manual_seed(0)
    distmat = torch.randint(-3, 4, (7, 60), generator=generator).to(dtype) / 3
    distmat[distmat == 0] *= -1
    distmat[0, ::2] = 0.0
    chosen = some(7, 60)
    chosen[4] = False
    start, row, column, value = marks_at(distmat, chosen)
    found = kernels.count_in(*(part.to(DEVICE) for part in (distmat, start, column, value)))
    for part, right in zip(found, expected_counts(distmat, row, column, value), strict=True):
        assert torch.equal(part.cpu(), right)


@pytest.mark.parametrize("case", ["unit", "rows of all sizes", "common mean", "tiny", "huge", "several runs"])
def test_bounds_hold(clustered, case):
    x = clustered(80, 1100 if case == "several runs" else 40, dtype=torch.float64)
    x = {
        "rows of all sizes": x * 10 ** torch.linspace(-4, 3, 80)[:, None],
        "common mean": x * 1e-3 + 7,
        "tiny": x * 1e-30,
        "huge": x * 1e15,
    }.get(case, x).float()
    start = torch.arange(81)
    search = kernels._Search(x, x, kernels._Marks(start, start[:-1], torch.zeros(80, dtype=torch.float64)))
    own, theirs = search.split(x, slice(None), 0), search.split(x, slice(None), 1)
    assert torch.equal(own[0].view(80, 2, -1), theirs[0].view(80, 2, -1).flip(1))
    score = torch.zeros(search.runs, 80, 80)
    search.products(own[0], theirs[0], score)
    size, reach = own[1].double(), own[2].double()
    computed = size[:, None] + size - 2 * score.double().sum(0)
    c = (x.double() - search.mean) * search.scale
    error = (computed - (c[:, None] - c).square().sum(-1)).abs()
    square = reach.square()
    assert (error <= 2 * search.beta * reach[:, None] * reach + search.zeta * (square[:, None] + square)).all()
    coarse = (own[0].double().view(80, 2, -1)[:, 0] @ theirs[0].double().view(80, 2, -1)[:, 1].T - c @ c.T).abs()
    if case != "several runs":  # there the errors of hi.hi' alone are small beside what 512 additions may cut off
        assert not (coarse <= search.beta * reach[:, None] * reach).all(), "the bound would pass hi.hi' alone"


def test_rejects(clustered):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"query and gallery float32, got torch\.float64"):
        kernels.count(x.double(), x.double(), *[None] * 3)
    with pytest.raises(ValueError, match=r"\(Q, D\) and \(G, D\) with D > 0, got \(2, 3\) and \(2, 2\)"):
        kernels.measure(x, x[:, :2], None, None)
    start = torch.zeros(3, dtype=torch.int64)
    found = kernels.count(x, x[:0], start, start[:0], start[:0].double())
    assert [len(part) for part in found] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["unit", "one sign", "large first"])
def test_tensor_cores_stay_within_the_bound(clustered, record_property, case):
    """What no CPU shows: the additions within a product of float16 rows, which may cut off instead of rounding."""
    n = 1000
    x = clustered(n, 2048)
    if case != "unit":  # the products of two rows all have one sign, so what is cut off adds up
        x = (torch.arange(n) % 2 * 2 - 1)[:, None] * (1 + 0.1 * x)
    if case == "large first":
        x[:, 1:] *= 1e-2
    x = x.cuda()
    start = torch.arange(n + 1, device="cuda")
    search = kernels._Search(x, x, kernels._Marks(start, start[:-1], torch.zeros(n, device="cuda").double()))
    own, theirs = search.split(x, slice(None), 0), search.split(x, slice(None), 1)
    score = torch.zeros(search.runs, n, n, device="cuda")
    search.products(own[0], theirs[0], score)
    c = (x.double() - search.mean) * search.scale
    reach = own[2].double()
    share = ((score.double().sum(0) - c @ c.T).abs() / (search.beta * reach[:, None] * reach)).max().item()
    record_property("share of the bound", share)
    print(f"{case}: at most {share:.3f} of the bound")
    assert share <= 1
