# SPDX-License-Identifier: Apache-2.0
"""Named checks for arguments, one message style: ``"<op>: <argument> must <rule>, got <value>"``.

Every checker takes the op's public name and the argument's name first and returns what it checked, converted where
that helps. A wrong kind of object is a ``TypeError``, a wrong value a ``ValueError``.
"""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Collection, Mapping, Set

import numpy as np
import torch
from torch import Tensor

_LONGEST = 2.0**63


def as_tensor(op: str, name: str, x: object) -> Tensor:
    """Return ``x`` as a tensor on its own device, sharing memory where it can.

    Takes torch tensors, NumPy arrays, anything with ``__dlpack__`` (CuPy, JAX, ...) and flat or nested sequences of
    numbers, which go to the CPU whatever torch's default device is. NumPy arrays that torch cannot wrap are copied:
    read-only, reversed, fields of structured arrays, and numbers longer than float64, which become float64.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            _refuse_beyond_int64(op, name, x)
            raise TypeError(f"{op}: {name} must hold numbers, got dtype {x.dtype}")
        known = np.dtype(np.float64) if x.dtype.type is np.longdouble else x.dtype.newbyteorder("=")
        whole = all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
        wrappable = whole and x.flags.writeable and x.flags.aligned and x.dtype.isnative and x.dtype.type is known.type
        return torch.from_numpy(x if wrappable else x.astype(known, order="C", copy=True))
    if hasattr(x, "__dlpack__"):
        return torch.from_dlpack(x)
    if isinstance(x, (list, tuple, range)):
        try:
            if not any(isinstance(row, np.ndarray) for row in x):
                return torch.tensor(x, device="cpu")
            rows = np.array(x)  # torch would take them number by number, with a warning
        except (TypeError, ValueError, RuntimeError) as error:
            _refuse_beyond_int64(op, name, x)
            raise TypeError(f"{op}: {name} must hold numbers in equal rows, got {_kind(x)} ({error})") from error
        return as_tensor(op, name, rows)
    raise TypeError(f"{op}: {name} must be a tensor or an array with __dlpack__, got {_kind(x)}")


def require_2d(op: str, name: str, x: Tensor) -> Tensor:
    """``x`` is a dense matrix."""
    if not torch.compiler.is_compiling() and x.layout != torch.strided:  # a traced backward may not ask
        raise TypeError(f"{op}: {name} must be dense, got {x.layout}")
    if x.ndim != 2:
        raise ValueError(f"{op}: {name} must be 2-D, got shape {tuple(x.shape)}")
    return x


def require_1d(op: str, name: str, x: Tensor) -> Tensor:
    """``x`` is a vector."""
    if x.ndim != 1:
        raise ValueError(f"{op}: {name} must be 1-D, got shape {tuple(x.shape)}")
    return x


def require_floating(op: str, name: str, x: Tensor) -> Tensor:
    """``x`` holds real floating-point numbers of 16 bits or more: torch computes in no shorter ones."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
    if x.dtype.itemsize < 2:
        raise TypeError(f"{op}: {name} must be floating point of 16 bits or more, got {x.dtype}")
    return x


def require_integer(op: str, name: str, x: Tensor) -> Tensor:
    """``x`` holds integers (bool is not one)."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must hold integers, got {x.dtype}")
    return x


def require_ids(op: str, name: str, x: object) -> Tensor:
    """What stands for labels, targets or rows: (N,) integers; returned in int64, where -1 is the number of none."""
    x = require_1d(op, name, as_tensor(op, name, x))
    if x.numel() == 0:
        return x.long()  # an empty list has no integer type
    ids = require_integer(op, name, x).long()
    if x.dtype == torch.uint64 and may_read(x) and ids.min() < 0:  # torch wraps what int64 does not hold
        raise ValueError(f"{op}: {name} must be below 2**63, got {2**64 + int(ids.min())}")
    return ids


def require_finite(op: str, name: str, x: Tensor, *, always: bool = False) -> Tensor:
    """``x`` holds no NaN and no infinity.

    On a GPU this costs a host read, so it happens only with ``FASTREID_U_CHECK=1``, or with ``always``, which ops that
    run once an epoch pass.
    """
    if not (always or may_read(x)):
        return x
    # One pass for the extremes, where NaN wins both, costs a twentieth of the mask that names the rows.
    if x.numel() == 0 or torch.stack(x.aminmax()).isfinite().all():
        return x
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite.reshape(len(x), -1)).any(dim=1).nonzero().flatten()
        rows = f"{len(bad)} of {len(x)} rows (first: row {int(bad[0])})"
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity in {rows}")
    return x


def require_values_in(
    op: str, name: str, x: Tensor, low: int, high: int, *, ignore: int | None = None, always: bool = False
) -> Tensor:
    """Every integer of ``x`` but ``ignore`` lies in ``low .. high - 1``; read on a GPU as ``require_finite`` does."""
    if not (always or may_read(x)):
        return x
    looked_at = x if ignore is None else x[x != ignore]
    if looked_at.numel() == 0:
        return x
    smallest, largest = int(looked_at.min()), int(looked_at.max())
    if smallest < low or largest >= high:
        worst = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}), got {worst}")
    return x


def require_reals_in(op: str, name: str, x: Tensor, low: float, high: float) -> Tensor:
    """Every number of ``x`` lies in ``[low, high]``, and none is NaN; read on a GPU as ``require_finite`` does."""
    if not may_read(x) or x.numel() == 0:
        return x
    smallest, largest = (extreme.item() for extreme in x.aminmax())  # NaN wins both
    if not (smallest >= low and largest <= high):
        raise ValueError(
            f"{op}: {name} must lie in [{low:g}, {high:g}], got {largest if smallest >= low else smallest:g}"
        )
    return x


def require_marked(op: str, name: str, x: Tensor, mask_name: str, mask: Tensor, *, ignore: int | None = None) -> Tensor:
    """Every index of ``x`` but ``ignore`` is True in ``mask``; read on a GPU as ``require_finite`` does."""
    if not may_read(x):
        return x
    looked_at = x if ignore is None else x[x != ignore]
    left_out = looked_at[~mask[looked_at]]
    if left_out.numel():
        raise ValueError(f"{op}: {name} must be True in {mask_name}, got {int(left_out[0])}")
    return x


def require_features(op: str, name: str, x: object) -> Tensor:
    """What ops that run once an epoch take as features: (N, D), floating, finite; returned in float32, detached.

    No row is longer than 2**63: squared distances stay below 2**128, where float32 ends.
    """
    x = require_floating(op, name, require_2d(op, name, as_tensor(op, name, x)))
    given = x.detach()
    x = given.float()  # float64 may hold more than float32 can
    if x.numel() == 0 or torch.stack(x.aminmax()).abs().max() * math.sqrt(x.shape[1]) <= _LONGEST:  # not if it is NaN
        return x
    require_finite(op, name, given, always=True)
    rows = given.double()
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1)
    length = torch.linalg.vector_norm(rows / largest, dim=1) * largest[:, 0]  # squares of float64 end at 1e308 too
    far = (length > _LONGEST).nonzero().flatten()
    if len(far):
        raise ValueError(
            f"{op}: {name} must have no row longer than 2**63 (9.2e18), whose squares float32 cannot hold, "
            f"got length {length[far[0]]:.2g} in {len(far)} of {len(x)} rows (first: row {int(far[0])})"
        )
    return x


def require_same_length(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``x`` has one entry for each row of ``other``."""
    if len(x) != len(other):
        raise ValueError(f"{op}: {name} must have one entry for each row of {other_name} ({len(other)}), got {len(x)}")
    return x


def require_same_width(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> Tensor:
    """Rows of ``x`` are as long as rows of ``other``."""
    if x.shape[1] != other.shape[1]:
        raise ValueError(f"{op}: {name} must have {other.shape[1]} columns like {other_name}, got {x.shape[1]}")
    return x


def require_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``x`` lives where ``other`` lives."""
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like {other_name}, got {x.device}")
    return x


def require_bool(op: str, name: str, value: object) -> bool:
    """``value`` is True or False; NumPy's are taken."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")
    return bool(value)


def require_int(op: str, name: str, value: object) -> int:
    """``value`` is a whole number; NumPy integers are taken, bool and float are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    return int(value)


def require_positive_int(op: str, name: str, value: object) -> int:
    """``value`` is a whole number of at least 1."""
    return require_int_at_least(op, name, value, 1)


def require_int_at_least(op: str, name: str, value: object, low: int) -> int:
    """``value`` is a whole number of at least ``low``."""
    number = require_int(op, name, value)
    if number < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")
    return number


def require_positive(op: str, name: str, value: object) -> float:
    """``value`` is a finite real number above 0."""
    number = _real(op, name, value)
    if not 0 < number < math.inf:  # which torch.compile can follow with a symbolic number
        raise ValueError(f"{op}: {name} must be positive and finite, got {value!r}")
    return number


def require_in_range(
    op: str, name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """``value`` is a real number in ``[low, high]``; ``open_low`` and ``open_high`` leave that end out."""
    number = _real(op, name, value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{op}: {name} must lie in {interval}, got {value!r}")
    return number


def one_or_more(op: str, name: str, value: object) -> tuple[list, bool]:
    """One number or a sequence or array of them, as a list yet to be checked, and whether it was a sequence."""
    given = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    if isinstance(given, numbers.Real):
        return [given], False
    try:
        values = None if isinstance(given, str | bytes | bytearray | Mapping | Set) else list(given)
    except TypeError:
        values = None
    if values is None or any(isinstance(each, list | tuple) for each in values):
        raise TypeError(f"{op}: {name} must be a real number or a sequence of them, got {given!r}")
    if not values:
        raise ValueError(f"{op}: {name} must hold at least one number, got an empty sequence")
    return values, True


def require_choice(op: str, name: str, value: object, choices: Collection[str]) -> str:
    """``value`` is one of ``choices``, which the message lists."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def clip_count(op: str, name: str, value: int, limit: int) -> int:
    """A neighbour count no larger than ``limit``, which the number of rows sets; warns when it has to cut."""
    if value <= limit:
        return value
    if limit > 0:  # an empty input asks for nothing
        warnings.warn(f"{op}: {name}={value} is more than the data have, using {limit}", stacklevel=3)
    return limit


def may_read(x: Tensor) -> bool:
    """Looking at values on a GPU stalls it, and inside torch.compile it breaks the graph."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("FASTREID_U_CHECK") == "1"


def _real(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a real number, got {value!r}")
    return float(value)


def _refuse_beyond_int64(op: str, name: str, x: object) -> None:
    """If an integer beyond int64 is why ``x``, a sequence or an array of objects, is no tensor: an error about that."""
    for value in x if isinstance(x, list | tuple) else x.flat if isinstance(x, np.ndarray) else ():
        if isinstance(value, list | tuple):
            _refuse_beyond_int64(op, name, value)
        elif isinstance(value, numbers.Integral) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: {name} must lie in [-2**63, 2**63), got {value}")


def _kind(x: object) -> str:
    return type(x).__name__
