# SPDX-License-Identifier: Apache-2.0
"""The command ``fastreid-u``: train, evaluate, extract, methods. Options of ``train`` come from the config's fields."""

import argparse
import ast
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from fastreid_u.config import Config

DESCRIPTION = "Unsupervised person re-identification. Without a command: what this installation can do."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed with a message, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastreid-u", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("train", help="learn a feature from unlabelled images", add_help=False)
    _add_evaluate(commands)
    _add_extract(commands)
    commands.add_parser("methods", help="list the methods")

    if not argv:
        from fastreid_u.__main__ import main as show_capabilities

        return show_capabilities([])
    try:
        if argv[0] == "train":
            _train(argv[1:])
        else:
            arguments = parser.parse_args(argv)
            {"evaluate": _evaluate, "extract": _extract, "methods": _methods}[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        print("\n" + ": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = None
        return 1
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _train(argv: list[str]) -> None:
    """``train``: what is asked first (data set, method) decides which options and defaults there are."""
    import tyro

    from fastreid_u.data import dataset_names, known_name
    from fastreid_u.engine.resume import stored_method, stored_tables
    from fastreid_u.engine.train import train
    from fastreid_u.methods import get_method

    parser = _train_parser()
    known, rest = parser.parse_known_args(argv)
    method = known.method
    if known.resume and method is None and known.logs_dir is not None:
        folder = Path(known.logs_dir).expanduser()
        method = stored_method(stored_tables("train", folder)) if (folder / "config.toml").exists() else None
    config_class = get_method(method or "cluster_contrast").Config
    words = [word for word in rest if word not in ("-h", "--help")]
    overrides = _given(config_class, words)
    dataset = overrides.pop("dataset", None)
    if dataset is not None and known.dataset is not None:
        raise ValueError(f"train: dataset must be given once, got {dataset!r} and -d {known.dataset!r}")
    dataset = dataset or known.dataset
    if len(words) < len(rest):
        parser.print_help()
        print("\nOptions of the method (defaults for this data set):\n")
        options = _options_class(config_class, config_class.for_dataset(known_name(dataset or "") or "").to_dict())
        tyro.cli(options, prog="fastreid-u train", args=["--help"])
    if dataset is None and not known.resume:
        raise ValueError(f"train: dataset must be one of {', '.join(dataset_names())}, a folder or a CSV, got none")
    before = {} if known.resume else _finished(known.logs_dir)
    try:
        train(
            dataset, method=known.method, root=known.root, logs_dir=known.logs_dir, resume=known.resume,
            overwrite=known.overwrite, device=known.device, quiet=known.quiet,
            data=_pairs(known.data, "train: --data") or None,  # none said: a resumed run's own
            source_data=_pairs(known.source_data, "train: --source-data") or None,
            **overrides,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(_finished(known.logs_dir), before, known.method)) from None


def _train_parser() -> argparse.ArgumentParser:
    """The options of ``train`` that no config holds.

    It has no positional argument: one would take the value of the first option that only the config knows.
    """
    from fastreid_u.data import dataset_names
    from fastreid_u.methods import method_names

    names = ", ".join(dataset_names())
    parser = argparse.ArgumentParser(
        prog="fastreid-u train", usage="fastreid-u train DATASET [options]", add_help=False, allow_abbrev=False,
        description=f"DATASET, here or after -d: {names}, a folder of crops, or a CSV file",
    )  # fmt: skip
    parser.add_argument("-d", "--dataset", help="same as the plain argument")
    methods = ", ".join(method_names())
    parser.add_argument("--method", help=f"{methods}, or FILE.py:CLASS (default cluster_contrast, or the run's own)")
    parser.add_argument("--data-dir", dest="root", help="where data sets lie (default $FASTREID_U_DATA or ./data)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE", help="option of the data set's reader"
    )
    parser.add_argument(
        "--source-data", action="append", default=[], metavar="KEY=VALUE", help="the same for a method's --source"
    )
    parser.add_argument("--logs-dir", help="run folder (default runs/DATASET-METHOD)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --logs-dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --logs-dir")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default a GPU if there is one)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    return parser


def _given(config_class: type[Config], words: list[str]) -> dict[str, Any]:
    """What ``words`` set, the plain argument as "dataset"; a word that sets nothing is an error.

    They are parsed twice, with defaults that differ in every field: what both times agree on was given. So nothing is
    lost however it is spelled (``-b8``), and what was said counts even if it is the default: a resumed run and another
    data set have others. Only of fields of unusual types the default is not told from nothing.
    """
    import tyro

    default = config_class().to_dict()
    hints = get_type_hints(config_class)
    told_apart = {name: _DIFFERENT[_kind(hints[name])] for name in default if _kind(hints[name]) in _DIFFERENT}
    parsed = []
    for turn in (0, 1):
        defaults = default | {name: pair[turn] for name, pair in told_apart.items()}
        options = _options_class(config_class, defaults, dataset=_DIFFERENT[str][turn], default_note="")
        parsed.append(vars(tyro.cli(options, prog="fastreid-u train", args=words)))
    agreed = {name: value for name, value in parsed[0].items() if value == parsed[1][name]}
    odd = default.keys() - told_apart.keys()
    return {name: value for name, value in agreed.items() if name not in odd or value != default[name]}


_DIFFERENT = {bool: (False, True), int: (0, 1), float: (0.0, 1.0), str: ("", "\0")}


def _kind(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    return get_args(hint)[0] if get_args(hint) else hint


def _options_class(
    config_class: type[Config], defaults: dict[str, Any], dataset: str = "", default_note: str | None = None
) -> type:
    """A dataclass like ``config_class`` with ``defaults`` and tyro's annotations, and ``dataset`` as plain argument.

    Each option's help ends with ``default_note``; None shows its default.
    """
    import tyro

    hints = get_type_hints(config_class)
    plain = Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="the data set", help_behavior_hint="")]
    fields = [("dataset", plain, dataclasses.field(default=dataset))]
    for field in dataclasses.fields(config_class):
        choices = field.metadata.get("choices")
        words = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
        note = tyro.conf.arg(
            help=f"{words} [{field.metadata['source']}]",
            aliases=field.metadata["flags"],
            help_behavior_hint=default_note,
        )
        default = dataclasses.field(default=defaults[field.name])
        fields.append((field.name, Annotated[hints[field.name], note], default))
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def _finished(logs_dir: str | None) -> dict[Path, int]:
    """Run folders that hold a finished epoch, and when it was written; all below runs/ where ``logs_dir`` is None."""
    folders = Path("runs").glob("*") if logs_dir is None else [Path(logs_dir).expanduser()]
    states = [folder / "state.safetensors" for folder in folders]
    return {state.parent: state.stat().st_mtime_ns for state in states if state.exists()}


def _how_to_go_on(now: dict[Path, int], before: dict[Path, int], method: str | None) -> str:
    """What an interrupted training leaves: the finished epoch that was not there before it, if there is one."""
    new = [folder for folder in now if now[folder] != before.get(folder)]
    if not new:
        return "no epoch was finished, so there is none to go on from"
    folder = shlex.quote(str(max(new, key=now.get)))
    own = f" --method {shlex.quote(method)}" if method and ":" in method else ""  # a run knows the name, not the file
    return f"finished epochs are saved, go on with: fastreid-u train --logs-dir {folder} --resume{own}"


def _pairs(items: list[str], flag: str) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{flag} must be KEY=VALUE, got {item!r}")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # a bare word is a string
            pairs[key] = text
    return pairs


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="mAP and CMC of a trained network")
    parser.add_argument("run", help="run folder or model_*.safetensors")
    parser.add_argument("dataset", nargs="?", help="default: the set it was trained on")
    parser.add_argument("--data-dir", dest="root")
    parser.add_argument("--data", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument("--ap", choices=("rank", "sklearn", "trapezoid"), help="default: the run's own")
    parser.add_argument("--device")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastreid_u.engine.trained import evaluate

    evaluate(
        arguments.run, arguments.dataset, root=arguments.root, data=_pairs(arguments.data, "evaluate: --data"),
        which=arguments.which, ap=arguments.ap, device=arguments.device,
    )  # fmt: skip


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="features of a folder of crops, as a NumPy .npz")
    parser.add_argument("run", help="run folder or model_*.safetensors")
    parser.add_argument("images", help="folder of crops (every image below it), image, CSV, or a known set")
    parser.add_argument("--out", type=Path, default=Path("features.npz"), help="arrays: features (N, D), paths (N,)")
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument("--device")


def _extract(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fastreid_u.engine.checkpoint import write_whole
    from fastreid_u.engine.display import Display
    from fastreid_u.engine.trained import extract

    out = _writable(arguments.out)
    result = extract(arguments.run, arguments.images, which=arguments.which, device=arguments.device, quiet=False)
    arrays = {"features": result.features.cpu().numpy(), "paths": np.array(result.paths)}

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # a file, not a name: savez would add a suffix to that
            np.savez(file, **arrays)

    write_whole(out, write)
    Display().line(f"{out}: {tuple(result.features.shape)} features, {len(result.bad)} unreadable")


def _writable(out: Path) -> Path:
    """Where features will lie: ``out`` with NumPy's suffix. What cannot be written is refused before the work."""
    out = out.expanduser()
    if not out.is_dir() and out.suffix != ".npz":
        out = out.with_name(out.name + ".npz")
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"extract: --out must be a file in an existing folder that can be written, got {out}")
    return out


def _methods(arguments: argparse.Namespace) -> None:
    from fastreid_u.methods import get_method, method_names

    for name in method_names():
        print(f"{name:<24} {get_method(name).paper.title}")
