# SPDX-License-Identifier: Apache-2.0
"""The files that settings are kept in: flat TOML tables of str, int, float, bool and None."""

import numbers
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """NumPy's numbers and truth values as Python's, paths as text: what a file of settings can hold."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | str) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def dump_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of flat tables of str, int, float, bool and None; None becomes a comment, as TOML has no null."""
    lines: list[str] = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        for key, value in values.items():
            name = key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml_value(key)
            lines.append(f"# {name} = none" if value is None else f"{name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    raise TypeError(f"config: a value must be str, int, float, bool or None to be saved, got {value!r}")


def load_toml(text: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(text)
