# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u evaluate``."""

import argparse

from fastreid_u.cli.network import add_network_options, run_or_weights
from fastreid_u.cli.pairs import read_pairs
from fastreid_u.cli.reading import add_reading_options


def evaluate(words: list[str]) -> None:
    """Print mAP and CMC of a trained network."""
    parser = argparse.ArgumentParser(prog="fastreid-u evaluate", description=evaluate.__doc__)
    add_network_options(parser)
    parser.add_argument("dataset", nargs="?", help="default: the set it was trained on")
    parser.add_argument("--data-dir", dest="root", help="where data sets lie (default $FASTREID_U_DATA or ./data)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE", help="option of the data set's reader"
    )
    parser.add_argument("--ap", choices=("rank", "sklearn", "trapezoid"), help="default: the run's own")
    parser.add_argument(
        "--rerank", choices=("openreid", "zhong", "clustering"), help="re-rank by this rule; default off"
    )
    parser.add_argument(
        "--ignore-cameras", action=argparse.BooleanOptionalAction, help="rank images of the query's own camera too"
    )
    add_reading_options(parser)
    given = vars(parser.parse_args(words))

    from fastreid_u.trained import evaluate as trained

    given["data"] = read_pairs(given["data"], "evaluate: --data")
    trained.evaluate(run_or_weights(given), given.pop("dataset"), **given)
