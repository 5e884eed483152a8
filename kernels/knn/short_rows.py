# SPDX-License-Identifier: Apache-2.0
"""Rows in a few directions, and what the products of these short rows prove about the distances of the long ones.

Let c be a centred row of length a, V a matrix of r columns with |V| <= 1, z = V'c and e = sqrt(a^2 - |z|^2) what is
left of c. Then c_i.c_j - z_i.z_j = c_i'(1 - VV')c_j, and 1 - VV' is positive semidefinite, with c'(1 - VV')c = e^2. So
by Cauchy and Schwarz c_i.c_j lies between z_i.z_j - e_i e_j and z_i.z_j + e_i e_j, that is

    |z_i - z_j|^2 + (e_i - e_j)^2  <=  |c_i - c_j|^2  <=  |z_i - z_j|^2 + (e_i + e_j)^2,

and with rows p = [e, z] of r + 1 numbers, p_i.p_j - a_j^2 / 2 is an upper bound of s_ij = c_i.c_j - a_j^2 / 2, by which
the rows j are ranked. The columns need not be at right angles: |V| <= 1 is all that is asked, and all that is proven.

What is computed differs from that in three ways.

1. V is Y K' with K = L^-1 and LL' = Y'Y + t, so that V'V + t KK' = 1. What is computed of the left side, in float64, is
   off by a matrix whose norm is at most rho, its Frobenius norm; t KK' is positive semidefinite, so |V|^2 <= 1 + rho,
   and V is divided by the square root of that.
2. z and e come from float64, where D roundings do not matter here, and are rounded to float16: z to the nearest, off by
   2^-11 of itself, e upwards. z_i.z_j is off by (2^-10 + 2^-22) a_i a_j at most, and by R 2^-22 a_i a_j where R = r + 1
   products are added by tensor cores, which may cut off instead of rounding; beta a_i a_j is more than both. Entries
   below float16's normal range are off by 2^-25 at most; a is made longer by 2^-14 sqrt(R) for these.
3. The doubt beta a_i a_j is put into e: with g^2 = e^2 + beta a^2, e_i e_j + beta a_i a_j <= g_i g_j (Cauchy and
   Schwarz once more). Rows are stored as [g, z]. zeta a_j^2 covers what float32 does to a_j^2 / 2.

So the computed bound holds for every pair. Nothing depends on where V comes from: bad directions make the bound loose,
never wrong. Of nested levels, the first columns of V are as good a V as all of them.
"""

import torch

_SAMPLE = 4096
_STEPS = 2
_ENTRIES = 1 << 22  # of float64 temporaries


class ShortRows:
    """How rows of a set become short rows.

    Attributes:
        mean: (D,) float32, of the searched rows.
        scale: a power of two, which changes no bit, that takes all lengths below 2^14.
        v: (D, R - 1) float64, of norm 1 at most.
    """

    def __init__(self, mean: torch.Tensor, scale: float, v: torch.Tensor) -> None:
        self.mean, self.scale, self.v = mean, scale, v
        self.width = v.shape[1] + 1
        self.tiny = 2.0**-14 * self.width**0.5
        self.beta = 2.0**-10 + 2.0**-22 + (self.width + 64) * 2.0**-22
        self.zeta = 2.0**-20

    def first(self, width: int) -> "ShortRows":
        """The same with fewer directions: rows of ``width`` numbers."""
        return ShortRows(self.mean, self.scale, self.v[:, : width - 1].contiguous())

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """float64."""
        return (x.double() - self.mean.double()) * self.scale

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[g, z] of each row, (N, R) float16, and a^2, (N,) float64."""
        short = torch.empty(len(x), self.width, dtype=torch.float16, device=x.device)
        size = torch.empty(len(x), dtype=torch.float64, device=x.device)
        step = max(1, _ENTRIES // x.shape[1])
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            c = self.centred(x[part])
            z = c @ self.v
            size[part] = a2 = c.square().sum(dim=1)
            left = (a2 - z.square().sum(dim=1)).clamp(min=0)
            g = (left + self.beta * (a2.sqrt() + self.tiny) ** 2).sqrt()
            short[part, 0] = (g * (1 + 2.0**-10) + 2.0**-24).half()
            short[part, 1:] = z.half()
        return short, size

    def lift(self, size: torch.Tensor) -> torch.Tensor:
        """What is added to a product for each row of the gallery, (M,) float32."""
        return (self.zeta * (size.sqrt() + self.tiny) ** 2 - size / 2).float()

    def threshold(self, size: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        """The least s of rows whose float32 distance is within ``limit``, (N,) float32, less what it is rounded by.

        Different distances may be one float32, and the smallest ones are all 0 there. Infinite without a limit.
        """
        far = (limit.double() + 2.0**-126) * self.scale**2
        least = ((1 - 2.0**-20) * size - (1 + 2.0**-20) * far) / 2
        return least.masked_fill(limit.isinf(), torch.inf).float()


def short_rows(y: torch.Tensor, width: int, lowest: torch.Tensor, highest: torch.Tensor) -> ShortRows | None:
    """Directions for rows of ``width`` numbers, by subspace iteration on a strided sample of ``y``; no random numbers.

    Args:
        y: (M, D) float32, the rows that are searched.
        lowest, highest: (D,) float32, of each column of all rows that take part.

    None where numbers are so large or so small that no power of two brings them into range.
    """
    mean = y.mean(dim=0, dtype=torch.float64).float()
    longest = float(torch.maximum(highest.double() - mean, mean - lowest.double()).norm())
    exponent = int(torch.tensor(longest, dtype=torch.float64, device="cpu").frexp().exponent)
    if not -86 <= exponent <= 114:
        return None
    scale = 2.0 ** (14 - exponent)
    sample = strided(y, _SAMPLE)
    c = (sample - mean) * scale
    v = c[torch.arange(width - 1, device=y.device) * len(c) // (width - 1)].T
    for _ in range(_STEPS):
        v = _contraction(c.T @ (c @ v.float()))
    return ShortRows(mean, scale, v)


def strided(rows: torch.Tensor, most: int) -> torch.Tensor:
    """``most`` or fewer of the rows at equal steps: lists of images are sorted by person, so the first would not do."""
    return rows[:: max(1, -(-len(rows) // most))]


def _contraction(y):
    """A matrix of norm 1 at most with the range of ``y``, (D, r) float64; see 1. of the module's text."""
    y = y.double()
    gram, one = y.T @ y, torch.eye(y.shape[1], dtype=torch.float64, device=y.device)
    t = gram.diagonal().sum() * 2.0**-40 + 2.0**-500
    # where Cholesky fails there are NaN, which make no candidate: the search by short rows then leaves all rows open
    lower = torch.linalg.cholesky_ex(gram + t * one)[0]
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    v = y @ inverse.T
    rho = torch.linalg.matrix_norm(v.T @ v + t * (inverse @ inverse.T) - one)
    return v / (1 + rho + 2.0**-30).sqrt()
