# SPDX-License-Identifier: Apache-2.0
"""The words KEY=VALUE that set the options of a data set's reader."""

import ast
from typing import Any


def read_pairs(words: list[str], flag: str) -> dict[str, Any]:
    """``["shift=1.0"]`` as ``{"shift": 1.0}``: a value is a Python literal, or else a string.

    Raises:
        ValueError: a word without "="; the message begins with ``flag``.
    """
    pairs = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{flag} must be KEY=VALUE, got {word!r}")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = text
    return pairs
