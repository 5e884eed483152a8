# SPDX-License-Identifier: Apache-2.0
"""Text from outside, such as file names, made fit for a terminal and a log of lines."""

import unicodedata

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """``text`` with line breaks, control characters and marks of writing direction as backslash escapes.

    >>> print(visible("a\\n\\x1b[2Jb.jpg"))
    a\\n\\x1b[2Jb.jpg
    """
    return "".join(_escaped(char) if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    """Whether a terminal does something else than to show ``char``."""
    return char in _BIDIRECTIONAL or unicodedata.category(char) in ("Cc", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
