# SPDX-License-Identifier: Apache-2.0
"""The command ``fastreid-u``: train, evaluate, extract, methods. Options of ``train`` come from the config's fields."""

import argparse
import ast
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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
    except KeyboardInterrupt:
        print("\ninterrupted; finished epochs are saved, go on with --logs-dir FOLDER --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = None
        return 1
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train(argv: list[str]) -> None:
    """``train``: what is asked first (data set, method) decides which options and defaults there are."""
    import tyro

    from fastreid_u.data import dataset_names, known_name
    from fastreid_u.engine.train import train
    from fastreid_u.methods import get_method, method_names

    parser = argparse.ArgumentParser(prog="fastreid-u train", add_help=False, allow_abbrev=False)
    parser.add_argument("dataset", nargs="?", help=f"{', '.join(dataset_names())}, a folder of crops, or a CSV file")
    parser.add_argument("-d", "--dataset", dest="dataset_flag", metavar="DATASET", help="same as the first argument")
    parser.add_argument("--method", default="cluster_contrast", help=", ".join(method_names()) + ", or FILE.py:CLASS")
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
    known, rest = parser.parse_known_args(argv)
    dataset = known.dataset or known.dataset_flag
    config_class = get_method(known.method).Config
    wants_help = "-h" in rest or "--help" in rest
    if wants_help:
        parser.print_help()
        print("\nOptions of the method (defaults for this data set):\n")
    elif dataset is None:
        raise ValueError(f"train: dataset must be one of {', '.join(dataset_names())}, a folder or a CSV, got none")

    options = _options_class(config_class, config_class.for_dataset(known_name(dataset or "") or ""))
    given = tyro.cli(options, prog="fastreid-u train", args=rest)
    if wants_help:
        return
    named = {word.partition("=")[0].replace("_", "-") for word in rest}
    overrides = {f.name: getattr(given, f.name) for f in dataclasses.fields(config_class) if named & _spellings(f)}
    train(
        dataset, method=known.method, root=known.root, logs_dir=known.logs_dir, resume=known.resume,
        overwrite=known.overwrite, device=known.device, quiet=known.quiet, data=_pairs(known.data),
        source_data=_pairs(known.source_data), **overrides,
    )  # fmt: skip


def _options_class(config_class: type[Config], defaults: Config) -> type:
    """A dataclass like ``config_class`` with ``defaults`` and tyro's annotations: help, source and short flags."""
    import tyro

    hints = get_type_hints(config_class)
    fields = []
    for field in dataclasses.fields(config_class):
        choices = field.metadata.get("choices")
        words = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
        note = tyro.conf.arg(help=f"{words} [{field.metadata['source']}]", aliases=field.metadata["flags"])
        default = dataclasses.field(default=getattr(defaults, field.name))
        fields.append((field.name, Annotated[hints[field.name], note], default))
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def _spellings(field: dataclasses.Field) -> set[str]:
    """The words that set ``field``. What was said counts even if it is the default: a resumed run has others."""
    name = field.name.replace("_", "-")
    return {f"--{name}", f"--no-{name}", *field.metadata["flags"]}


def _pairs(items: list[str]) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"train: --data must be KEY=VALUE, got {item!r}")
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
    parser.add_argument("--ap", choices=("rank", "sklearn", "trapezoid"), default="rank")
    parser.add_argument("--device")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastreid_u.engine.trained import evaluate

    evaluate(
        arguments.run, arguments.dataset, root=arguments.root, data=_pairs(arguments.data), which=arguments.which,
        ap=arguments.ap, device=arguments.device,
    )  # fmt: skip


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="features of a folder of crops, as a NumPy .npz")
    parser.add_argument("run", help="run folder or model_*.safetensors")
    parser.add_argument("images", help="folder of crops or CSV")
    parser.add_argument("--out", type=Path, default=Path("features.npz"), help="arrays: features (N, D), paths (N,)")
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument("--device")


def _extract(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fastreid_u.engine.trained import extract

    result = extract(arguments.run, arguments.images, which=arguments.which, device=arguments.device, quiet=False)
    np.savez(arguments.out, features=result.features.cpu().numpy(), paths=np.array(result.paths))
    print(f"{arguments.out}: {tuple(result.features.shape)} features, {len(result.bad)} unreadable")


def _methods(arguments: argparse.Namespace) -> None:
    from fastreid_u.methods import get_method, method_names

    for name in method_names():
        print(f"{name:<24} {get_method(name).title}")
