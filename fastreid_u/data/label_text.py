# SPDX-License-Identifier: Apache-2.0
"""Identities and cameras as people and table programs write them: gaps, whole numbers, any other text."""

import re
from collections.abc import Iterable
from decimal import Decimal

# What pandas, R, SQL and spreadsheets write where a value is missing. "NA" alone only in capitals: Na is a name.
_GAPS = {"", "nan", "-nan", "none", "null", "nat", "n/a", "<na>", "#n/a", "#na"}

# 7, 007, -1, 7.0, "1,000". The lengths are bounded because the digits of a number take time that grows faster.
_WHOLE = re.compile(r"([+-]?)(\d{1,300}|\d{1,3}(?:,\d{3}){1,99})(?:\.0*)?")
_SHORTENED = re.compile(r"[+-]?\d+(?:\.\d{1,300})?[eE][+-]?\d{1,2}")  # 1e3, 1.23457E+14

_INT64 = 2**63


def is_gap(text: str) -> bool:
    """Whether ``text`` stands for no value: empty, nan, None, null, NA, N/A, <NA> and the like."""
    return text == "NA" or text.casefold() in _GAPS


def whole_number(text: str) -> int | None:
    """The whole number that ``text`` is: 7, 007, 7.0 or "7,000"; None for anything else, 1e3 included."""
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    number = int(match[2].replace(",", ""))
    return -number if match[1] == "-" else number


def shortened_number(text: str) -> int | None:
    """The whole number that ``text`` is with an exponent: 1e3, 1.5E+03; None for anything else, 7 included."""
    if _SHORTENED.fullmatch(text) is None:
        return None
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else None


def numbering(texts: Iterable[str | None], *, keep_integers: bool = False) -> dict[str, int]:
    """From the text of a label to its number, 0 .. n-1 in ascending order; None is left out.

    Labels are numbers if all are whole numbers ("7", "007", "7.0" and "0.7e1" are one), else text, where "7.0" is still
    "7". With ``keep_integers`` numbers that fit 64 bits stay as they are.
    """
    written = {text for text in texts if text is not None}
    numbers: dict[str, int] = {}
    for text in written:
        number = whole_number(text)
        number = shortened_number(text) if number is None else number
        if number is None:
            return _rank({text: _without_zeros(text) for text in written})
        numbers[text] = number
    if keep_integers and all(-_INT64 <= number < _INT64 for number in numbers.values()):
        return numbers
    return _rank(numbers)


def _rank(values: dict[str, str] | dict[str, int]) -> dict[str, int]:
    places = {value: place for place, value in enumerate(sorted(set(values.values())))}
    return {text: places[value] for text, value in values.items()}


def _without_zeros(text: str) -> str:
    return text.partition(".")[0] if whole_number(text) is not None else text
