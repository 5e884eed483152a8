# SPDX-License-Identifier: Apache-2.0
"""The cascade of the Triton search: on a GPU if there is one, else interpreted, so on few rows.

A search of this size would go the plain way; here it is told to go by short rows.
"""

import pytest
import torch

from fastreid_u.kernels import knn
from fastreid_u.kernels.knn import cascade, plan, short_rows
from fastreid_u.reference.knn import knn as reference_knn

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made_short(x, width, gallery=None):
    rows = x if gallery is None else torch.cat([x, gallery])
    return short_rows.short_rows(x if gallery is None else gallery, width, *torch.aminmax(rows, dim=0))


@pytest.fixture
def forced(monkeypatch):
    """``forced(width)``: every search goes by rows of that width; the rows that the cascade left open, as they come."""

    def choose(width):
        left, search = [], cascade.search
        monkeypatch.setattr(knn, "choose", lambda x, y, k, hint: plan.Plan(made_short(x, width, y), hint is not None))
        monkeypatch.setattr(cascade, "search", lambda *args: (rows := search(*args), left.extend(rows.tolist()))[0])
        return left

    return choose


def assert_same_neighbours(x, k, gallery=None, hint=None):
    given = (None if part is None else part.to(DEVICE) for part in (gallery, hint))
    sq_dist, index = (part.cpu() for part in knn.knn(x.to(DEVICE), k, *given))
    expected = reference_knn(x, k, gallery=gallery)
    assert (sq_dist.dtype, index.dtype) == (torch.float32, torch.int64)
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(sq_dist, expected[0], atol=0, rtol=1.2e-7)


def trained(n, d, number=0):
    """Unit rows with the spectrum of trained features: identities in 12 directions, a little noise in all."""
    generator = torch.Generator().manual_seed(number)
    latent = torch.randn(n // 4 + 1, 12, generator=generator).repeat_interleave(4, dim=0)[:n]
    latent = latent + 0.3 * torch.randn(n, 12, generator=generator)
    x = latent @ torch.randn(12, d, generator=generator) + 0.05 * torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(x)


@pytest.mark.parametrize(
    ("n", "d", "k", "width"), [(1, 3, 1, 64), (2, 70, 5, 64), (20, 9, 7, 64), (21, 260, 6, 256), (19, 140, 15, 128)]
)
def test_cascade_matches_reference(forced, n, d, k, width):
    """Fewer numbers in a row than directions and fewer rows than 2 k among them."""
    left = forced(width)
    assert_same_neighbours(trained(n, d), k)
    assert left == []


@pytest.mark.parametrize(("n", "m", "k"), [(1, 140, 5), (20, 1, 3), (5, 41, 41)])
def test_cascade_in_a_gallery(forced, n, m, k):
    left = forced(64)
    assert_same_neighbours(trained(n, 20), k, trained(m, 20, number=1) * 1.5)
    assert left == []


def test_cascade_with_a_flat_spectrum_and_a_common_mean(forced, clustered):
    left = forced(64)
    x = clustered(50, 150) * 0.01 + 5
    assert_same_neighbours(x[:20].contiguous(), 4, x)
    assert left == []


def test_cascade_copies_and_near_copies_tie_by_index(forced):
    forced(64)
    x = trained(24, 70)
    x[9:15] = x[5]
    x[16:20] = x[5] * (1 + 2.0**-22)
    assert_same_neighbours(x, 6)


def test_cascade_goes_on_the_plain_way_where_candidates_are_too_many(forced, clustered):
    """More copies than a buffer holds, all rows equal, rows that short ones cannot tell apart."""
    left = forced(64)
    x = torch.ones(140, 4)
    x[3:5] *= 2
    assert_same_neighbours(x[:6].contiguous(), 2, x)
    assert left == [0, 1, 2, 5]
    left.clear()
    x = torch.ones(150, 3)
    assert_same_neighbours(x[:2].contiguous(), 3, x)
    assert left == [0, 1]
    left.clear()
    x = torch.cat([clustered(140, 300), torch.full((1, 300), 1e4)])
    assert_same_neighbours(x[::70].contiguous(), 2, x)
    assert left == [0, 1, 2]


def test_cascade_keeps_bits_of_one_stretch_at_a_time(forced, monkeypatch):
    forced(64)
    monkeypatch.setattr(cascade, "_STRETCH", 128)
    monkeypatch.setattr(cascade, "_ROWS", 11)
    x = trained(300, 70)
    assert_same_neighbours(x[::20].contiguous(), 3, x)


@pytest.mark.parametrize("kind", ["neighbours", "random", "wrong", "narrow", "repeated", "empty"])
def test_a_hint_changes_nothing_but_the_work(forced, monkeypatch, kind):
    left = forced(64)
    x, k = trained(24, 70), 4
    generator = torch.Generator().manual_seed(0)
    hint = {
        "neighbours": reference_knn(x, k + 2)[1],
        "random": torch.randint(24, (24, 9), generator=generator).int(),
        "wrong": torch.randint(-(2**40), 2**40, (24, 9), generator=generator),
        "narrow": torch.arange(24)[:, None].expand(24, k - 1),
        "repeated": torch.zeros(24, 7, dtype=torch.int64),
        "empty": torch.zeros(24, 0, dtype=torch.int64),
    }[kind]
    guessed, guess = [], cascade._guess
    monkeypatch.setattr(cascade, "_guess", lambda *args: (guessed.append(1), guess(*args))[1])
    assert_same_neighbours(x, k, hint=hint)
    assert len(guessed) == (kind in ("narrow", "empty"))
    assert len(left) == (24 if kind in ("wrong", "repeated") else 0)


def test_a_hint_of_another_form_is_refused():
    x = trained(8, 5)
    for hint in (torch.zeros(7, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), torch.zeros(8, 3)):
        with pytest.raises(ValueError, match=r"knn: hint must be \(8, h\) int32 or int64, got \("):
            knn.knn(x, 2, hint=hint)


@pytest.mark.parametrize("case", ["low rank", "trained", "rows of all sizes", "common mean", "tiny", "huge"])
def test_bounds_hold(case):
    """And would not, were the short rows rounded to bfloat16, where nothing is left of them to hide it."""
    generator = torch.Generator().manual_seed(0)
    x = trained(80, 90).double()
    low_rank = torch.randn(80, 20, generator=generator).double() @ torch.randn(20, 90, generator=generator).double()
    x = {
        "low rank": low_rank,
        "trained": x,
        "rows of all sizes": x * 10 ** torch.linspace(-4, 3, 80)[:, None],
        "common mean": x * 1e-3 + 7,
        "tiny": x * 1e-20,
        "huge": x * 1e15,
    }[case].float()
    short = made_short(x, 64)
    rows, size = short.of(x)
    c = short.centred(x)
    exact = c @ c.T - c.square().sum(dim=1) / 2
    upper = (rows.double() @ rows.double().T).float() + short.lift(size)
    assert (upper.double() >= exact).all()
    if case == "low rank":
        coarse = (short.centred(x) @ short.v).bfloat16().double()
        g = rows[:, :1].double()
        assert not ((coarse @ coarse.T + g @ g.T + short.lift(size).double()) >= exact).all()
    # the limit of a row is not above what any pair within it has
    sq_dist = (x.double()[:, None] - x.double()).square().sum(dim=2).float()
    for j in (0, 41):
        assert (short.threshold(size, sq_dist[:, j]).double() <= exact[:, j]).all()


@pytest.mark.parametrize("case", ["trained", "rank of 3", "copies", "zero"])
def test_directions_never_lengthen(case):
    x = trained(200, 90)
    x = {"trained": x, "rank of 3": x[:, :3] @ x[:3], "copies": x[:1].repeat(200, 1), "zero": x * 0}[case]
    short = made_short(x, 16)
    assert torch.linalg.matrix_norm(short.v, 2) <= 1
    c = short.centred(x)
    left = 1 - (c @ short.v).square().sum() / c.square().sum()
    least = 1 - torch.linalg.svdvals(c)[:15].square().sum() / c.square().sum()
    assert case in ("copies", "zero") or left < 1.1 * least + 1e-6, (left, least)


def test_numbers_out_of_range_go_the_plain_way():
    for factor in (1e-30, 1e36):
        assert made_short(trained(20, 30) * factor, 64) is None


def test_no_candidate_is_missing():
    x = trained(150, 70)
    short = made_short(x, 64)
    rows, size = short.of(x)
    upper = rows.float() @ rows.float().T + short.lift(size)
    threshold = upper.median(dim=1).values
    threshold[3], threshold[4] = torch.inf, upper[4].min()
    given = [part.to(DEVICE) for part in (rows[:9], rows, short.lift(size), threshold[:9])]
    place, count = (part.cpu() for part in cascade._candidates(*given, 128))
    for i in range(9):
        expected = (upper[i] >= threshold[i]).nonzero().flatten()
        assert count[i] == len(expected)
        if count[i] <= 128:
            assert place[i, : count[i]].sort().values.tolist() == expected.tolist()
    assert count.tolist()[3:5] == [0, 150]
    assert torch.equal(place, cascade._candidates(*given, 128)[0].cpu()), "no race decides where they stand"


def test_guess_is_good_and_is_all_there_is_of_few_rows():
    x = trained(400, 70)
    short = made_short(x, 128)
    rows, size = short.of(x)
    guess = cascade._guess(*(part.to(DEVICE) for part in (rows[:50], rows, short.lift(size))), 5).cpu()
    assert guess.shape == (50, 8)
    share = (guess[:, :, None] == reference_knn(x, 5)[1][:50, None]).any(dim=1).float().mean()
    assert share > 0.9
    few = cascade._guess(*(part.to(DEVICE) for part in (rows[:5], rows[:7], short.lift(size)[:7])), 5).cpu()
    assert few.sort(dim=1).values.tolist() == [list(range(-1, 7))] * 5


def test_the_way_is_chosen_by_what_a_sample_shows(monkeypatch):
    monkeypatch.setattr(plan, "_SETUP", 0.0)  # for a set as small as this
    monkeypatch.setattr(plan, "_BYTES", 1e15)
    n, d, k = 600, 256, 4
    x = trained(n, d)
    found = plan.choose(x, x, k, None)
    assert (found.short.width, found.hinted) == (64, False)
    good = (torch.arange(n)[:, None] // 4 * 4 + torch.arange(6)) % n
    assert plan.choose(x, x, k, good).hinted
    random = torch.randint(n, (n, 6), generator=torch.Generator().manual_seed(0))
    assert not plan.choose(x, x, k, random).hinted
    flat = torch.randn(n, 1024, generator=torch.Generator().manual_seed(0))
    assert plan.choose(flat, flat, k, None) is None
    assert plan.choose(x * 0, x * 0, k, None) is None


def test_small_searches_and_many_neighbours_go_the_plain_way_without_a_look(monkeypatch):
    monkeypatch.setattr(plan, "short_rows", None)
    x = torch.zeros(1, 2048)
    for n, k in ((12_936, 30), (1_000_000, 129)):
        assert plan.choose(x.expand(n, 2048), x.expand(n, 2048), k, None) is None


def test_work_that_is_promised():
    """At 1,000,000 x 2048: operations of the products, by what is in the cost of a way."""
    n, d, k = 10**6, 2048, 30
    whole = plan.plain_seconds(n, n, d, k)
    assert plan.short_seconds(n, n, d, 256, 100, False) < whole / 3
    assert plan.short_seconds(n, n, d, 256, 100, True) < plan.short_seconds(n, n, d, 256, 100, False)
    assert plan.short_seconds(n, n, d, 64, 5000, True) > whole, "what is measured is dear"


@pytest.mark.gpu
@pytest.mark.parametrize("width", plan.WIDTHS)
def test_tensor_cores_stay_within_the_bound_of_short_rows(width):
    """What no CPU shows: the additions within a product of short rows. All products have one sign: cuts add up."""
    n = 1024
    x = (torch.arange(n) % 2 * 2 - 1)[:, None] * (1 + 0.1 * trained(n, width - 1))
    short = made_short(x.cuda(), width)
    rows, size = short.of(x.cuda())
    c = short.centred(x.cuda())
    exact = c @ c.T - c.square().sum(dim=1) / 2
    never = torch.full((n,), 2.0**100, device="cuda")
    assert cascade._candidates(rows, rows, short.lift(size), never, 128)[1].sum() == 0
    threshold = exact.float().amin(dim=1).nextafter(never.neg())
    assert (cascade._candidates(rows, rows, short.lift(size), threshold, 128)[1] == n).all()
    highest = exact.double().topk(9, dim=1).values[:, -1].float().nextafter(never.neg())
    place, count = cascade._candidates(rows, rows, short.lift(size), highest, 1024)
    named = torch.zeros(n, n, dtype=torch.bool, device="cuda")
    for i in range(0, n, 97):
        named[i, place[i, : count[i]].long()] = True
        assert named[i][exact[i] >= highest[i].double()].all()
