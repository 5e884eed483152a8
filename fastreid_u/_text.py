# SPDX-License-Identifier: Apache-2.0
"""Text from outside, such as file names, made fit for a terminal and a log of lines."""

import unicodedata


def visible(text: str) -> str:
    """``text`` with all that does not print as backslash escapes.

    That is line breaks, control characters, marks of writing direction and bytes of a name that are no text.

    >>> print(visible("a\\n\\x1b[2Jb.jpg"))
    a\\n\\x1b[2Jb.jpg
    """
    if text.isprintable():
        return text
    plain = (c.isprintable() or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if ok else c.encode("unicode_escape").decode("ascii") for c, ok in zip(text, plain, strict=True))
