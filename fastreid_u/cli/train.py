# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u train``: the method that is asked for decides which settings there are, each of them an option."""

import argparse
import dataclasses
import difflib

from fastreid_u.cli.interrupted import finished_epochs, how_to_go_on
from fastreid_u.cli.options import add_options
from fastreid_u.cli.pairs import read_pairs
from fastreid_u.config import Config


def train(words: list[str]) -> None:
    """Learn a feature from unlabelled images."""
    from fastreid_u.data import dataset_names, known_name
    from fastreid_u.engine import train as engine
    from fastreid_u.recipes import get_method

    words = _with_dashes(words)
    parser = _parser_of_the_run()
    method = get_method(_method(parser.parse_known_args(words)[0]) or "cluster_contrast")
    add_options(parser.add_argument_group(f"settings of {method.name}"), method.Config)
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"Unrecognized options: {' '.join(unknown)}{_hint(unknown[0], method.Config)}")
    given = vars(namespace)  # a setting that was not given is not in it

    plain = given.pop("DATASET")
    if plain is not None and given["dataset"] is not None:
        raise ValueError(f"train: dataset must be given once, got {plain!r} and -d {given['dataset']!r}")
    given["dataset"] = given["dataset"] or plain or None
    if given.pop("help"):
        parser.set_defaults(**method.Config.for_dataset(known_name(given["dataset"] or "") or "").to_dict())
        parser.print_help()
        parser.exit()
    if given["dataset"] is None and not given["resume"]:
        raise ValueError(f"train: dataset must be one of {', '.join(dataset_names())}, a folder or a CSV, got none")
    for name in ("data", "source_data"):  # without any, a resumed run has its own
        given[name] = read_pairs(given[name], f"train: --{name.replace('_', '-')}") or None

    before = {} if given["resume"] else finished_epochs(given["logs_dir"])
    try:
        engine.train(**given)
    except KeyboardInterrupt:
        now = finished_epochs(given["logs_dir"])
        raise KeyboardInterrupt(how_to_go_on(now, before, given["method"])) from None


def _parser_of_the_run() -> argparse.ArgumentParser:
    """The options of ``train`` that no config holds, named as the arguments of ``fastreid_u.train``."""
    from fastreid_u.data import dataset_names
    from fastreid_u.recipes import methods

    known = f"{', '.join(methods())}, or FILE.py:CLASS (default cluster_contrast, or the run's own)"
    parser = argparse.ArgumentParser(
        prog="fastreid-u train", usage="fastreid-u train DATASET [options]", add_help=False, allow_abbrev=False,
        description=f"{train.__doc__} Defaults are those of the method for the data set.",
    )  # fmt: skip
    names = ", ".join(dataset_names())
    parser.add_argument("DATASET", nargs="?", help=f"{names}, a folder of crops, or a CSV file")
    parser.add_argument("-h", "--help", action="store_true", help="show the options, those of --method among them")
    parser.add_argument("-d", "--dataset", help="same as the plain argument")
    parser.add_argument("--method", help=known)
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


def _method(given: argparse.Namespace) -> str | None:
    """The method that was asked for; of a run to go on with, its own, which must be ours: its file is not imported."""
    from fastreid_u.engine.arguments import stored_method
    from fastreid_u.engine.folder import RunFolder

    if given.method is not None or not given.resume or given.logs_dir is None:
        return given.method
    folder = RunFolder(given.logs_dir)
    if not folder.has_settings:
        return None
    return stored_method("train", folder.config, folder.settings("train")["run"]["method"], to_train=True)


def _with_dashes(words: list[str]) -> list[str]:
    """``--batch_size=8`` as ``--batch-size=8``."""
    options = words[: words.index("--")] if "--" in words else words
    names = [word.partition("=")[0] if word.startswith("--") else "" for word in options]
    dashed = [name.replace("_", "-") + word[len(name) :] for name, word in zip(names, options, strict=True)]
    return dashed + words[len(options) :]


def _hint(word: str, config_class: type[Config]) -> str:
    """The settings that begin with ``word``, or else the one that is spelled most like it."""
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config_class)]
    close = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if word.startswith("--") and close else ""
