# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u evaluate``."""

import argparse

from fastreid_u.cli.pairs import read_pairs
from fastreid_u.cli.reading import add_reading_options


def evaluate(words: list[str]) -> None:
    """Print mAP and CMC of a trained network."""
    parser = argparse.ArgumentParser(prog="fastreid-u evaluate", description=evaluate.__doc__)
    parser.add_argument("run", help="run folder or model_*.safetensors")
    parser.add_argument("dataset", nargs="?", help="default: the set it was trained on")
    parser.add_argument("--data-dir", dest="root", help="where data sets lie (default $FASTREID_U_DATA or ./data)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE", help="option of the data set's reader"
    )
    parser.add_argument("--which", choices=("last", "best"), default="last", help="default: last")
    parser.add_argument("--ap", choices=("rank", "sklearn", "trapezoid"), help="default: the run's own")
    parser.add_argument(
        "--rerank", choices=("openreid", "zhong", "clustering"), help="re-rank by this rule; default off"
    )
    parser.add_argument(
        "--ignore-cameras", action=argparse.BooleanOptionalAction, help="rank images of the query's own camera too"
    )
    add_reading_options(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default a GPU if there is one)")
    given = vars(parser.parse_args(words))

    from fastreid_u.trained import evaluate as trained

    given["data"] = read_pairs(given["data"], "evaluate: --data")
    trained.evaluate(given.pop("run"), given.pop("dataset"), **given)
