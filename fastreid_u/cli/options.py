# SPDX-License-Identifier: Apache-2.0
"""The fields of a config as options of an argparse parser."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastreid_u.config import Config

_PLAIN = (bool, int, float, str, os.PathLike, NoneType)
# The words of the types that are not called with a word to make a value of it.
_VALUES: dict[type, dict[str, Any]] = {NoneType: {"none": None}, bool: {"true": True, "false": False}}


def add_options(parser: Any, config_class: type[Config]) -> None:
    """Give ``parser``, or a group of one, an option for each field of ``config_class``: its name and its short flags.

    What is not given is absent from the namespace. The help shows the defaults that ``parser.set_defaults`` sets.

    Raises:
        TypeError: a field's type cannot be read from a word.
        ValueError: two options have one flag.
    """
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        try:
            _add_option(parser, field, hints[field.name])
        except argparse.ArgumentError as error:
            raise ValueError(f"config: {field.name} must have flags of its own, got {error}") from error


def _add_option(parser: Any, field: dataclasses.Field, hint: Any) -> None:
    about = field.metadata
    name = field.name.replace("_", "-")
    flags = [*about.get("flags", ()), f"--{name}"]
    words = f"{about.get('help', '')} [{about.get('source', '')}]".replace("%", "%%")
    shared = {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{words} (default: %(default)s)"}
    if hint is bool or about.get("switch"):
        parser.add_argument(*flags, f"--no-{name}", action=_Switch, **shared)
        return
    kinds = _kinds(field.name, hint)
    names = ["None" if kind is NoneType else kind.__name__.upper() for kind in kinds]
    choices = about.get("choices")
    metavar = f"{{{','.join(map(str, choices))}}}" if choices else "|".join(names)
    parser.add_argument(*flags, type=_reader(kinds), metavar=metavar, **shared)


def _kinds(name: str, hint: Any) -> tuple[type, ...]:
    """``(int, NoneType)`` of ``int | None``."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not all(isinstance(kind, type) and issubclass(kind, _PLAIN) for kind in kinds):
        raise TypeError(f"config: {name} must be of bool, int, float, str, a path or None, got {hint}")
    return kinds


def _reader(kinds: tuple[type, ...]) -> Callable[[str], Any]:
    """A function that makes of a word a value of the first type that takes it; str, which takes any, comes last."""

    def read(word: str) -> Any:
        for kind in sorted(kinds, key=lambda kind: kind is str):
            with suppress(ValueError, KeyError):
                return _VALUES[kind][word.lower()] if kind in _VALUES else kind(word)
        raise argparse.ArgumentTypeError(
            f"must be {' or '.join('None' if kind is NoneType else kind.__name__ for kind in kinds)}, got {word!r}"
        )

    return read


class _Switch(argparse.Action):
    """On by its name, off by ``--no-`` and its name; argparse's own takes ``--no-cam`` for the opposite of a cam."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str = "") -> None:
        setattr(namespace, self.dest, option_string != self.option_strings[-1])
