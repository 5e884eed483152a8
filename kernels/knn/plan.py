# SPDX-License-Identifier: Apache-2.0
"""Which way a search goes: how wide its short rows are, or whole rows, by the cost that a sample foretells.

The rates are estimates for an H200, none of them measured. What decides are their ratios, which other GPUs share:
tensor operations to bytes of memory are 184 to 1 there and 168 to 1 on an A100.
"""

from typing import NamedTuple

import torch

from .cascade import GUESSED, capacity, guesses, limits
from .short_rows import ShortRows, short_rows, strided

WIDTHS = (64, 128, 256)  # a tile of so many numbers each stays on the chip whole
_MOST = 128  # neighbours: candidates of more would not keep within the registers that order them
_QUERIES, _SEARCHED = 256, 16384  # rows of the sample
_FLOPS = 550e12  # float16 operations a second of a product, some 70 % of the sheet's
_BYTES = 4e12  # a second, of rows gathered
_SCORES = 5.5e12  # bytes a second through L2
_EPILOGUE = 0.15e-12  # seconds a pair of short rows, for its bit
_DOUBLE = 40e12  # float64 operations a second, by which rows are projected
_SETUP = 3e-3  # seconds: directions, sample, and some hundred launches


class Plan(NamedTuple):
    """How the cascade goes.

    Attributes:
        short: makes the short rows.
        hinted: whether the limits come from the hint.
    """

    short: ShortRows
    hinted: bool


def choose(x: torch.Tensor, y: torch.Tensor, k: int, hint: torch.Tensor | None) -> Plan | None:
    """The plan that promises to take least, or None where the plain search does.

    Small or flat sets go the plain way: the former without a look, as nothing could pay for it.
    """
    whole = plain_seconds(len(x), len(y), x.shape[1], k)
    if k > _MOST or _SETUP + short_seconds(len(x), len(y), x.shape[1], WIDTHS[0], k, hint is not None) >= whole:
        return None
    ends = torch.aminmax(y, dim=0) if y is x else [*torch.aminmax(y, dim=0), *torch.aminmax(x, dim=0)]
    bounds = torch.stack(list(ends)).aminmax(dim=0)
    widest = short_rows(y, WIDTHS[-1], *bounds)
    if widest is None:
        return None
    best, plan = whole, None
    for width, hinted, measured, overflows in forecast(x, y, k, hint, widest):
        seconds = short_seconds(len(x), len(y), x.shape[1], width, measured, hinted) + overflows * whole
        if seconds < best:
            best, plan = seconds, (width, hinted)
    return plan and Plan(widest.first(plan[0]), plan[1])


def plain_seconds(n: int, m: int, d: int, k: int) -> float:
    """Of a search for k neighbours among m rows of d numbers for n rows."""
    return n * m * (2 * d / _FLOPS + 8 / _SCORES) + n * 1.3 * k * 4 * d / _BYTES


def short_seconds(n: int, m: int, d: int, width: int, measured: float, hinted: bool) -> float:
    """The same in a cascade that measures so many rows a row, once a sample has been looked at."""
    columns = width if hinted else width + GUESSED
    passes = 1 if hinted else 2
    products = n * m * (2 * columns / _FLOPS + passes * _EPILOGUE)
    return products + max(n, m) * 2 * d * width / _DOUBLE + n * measured * 4 * d / _BYTES


def forecast(
    x: torch.Tensor, y: torch.Tensor, k: int, hint: torch.Tensor | None, widest: ShortRows
) -> list[tuple[int, bool, float, float]]:
    """(width, hinted, rows measured for each row, share of rows with too many candidates) of each way there is."""
    step = max(1, -(-len(x) // _QUERIES))
    query = torch.arange(0, len(x), step, device=x.device)
    searched = strided(y, _SEARCHED)
    times = len(y) / len(searched)
    a2, b2 = widest.of(x[query])[1], widest.of(searched)[1]
    score = widest.centred(x[query]).float() @ ((searched - widest.mean) * widest.scale).T - b2.float() / 2
    rank = min(len(searched), max(1, round(k / times)))
    ways = [(False, guesses(k), score.topk(rank, dim=1).values[:, -1])]
    if hint is not None:
        ways.append((True, hint.shape[1], widest.threshold(a2, limits(x, y, query, hint[query], k))))
    cap, found = capacity(k), []
    for width in WIDTHS:
        short = widest if width == widest.width else widest.first(width)
        (mine, _), (theirs, _) = short.of(x[query]), short.of(searched)
        upper = mine.float() @ theirs.float().T + short.lift(b2)
        for hinted, before, threshold in ways:
            count = times * (upper >= threshold[:, None]).sum(dim=1).double()
            count[threshold.isinf()] = 2 * cap  # a row without a limit
            over = count > cap
            inside = count.masked_fill(over, 0).mean().item()
            found.append((width, hinted, before + inside, over.double().mean().item()))
    return found
