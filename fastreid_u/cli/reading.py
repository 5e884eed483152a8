# SPDX-License-Identifier: Apache-2.0
"""The options of the commands that read images for a trained network."""

import argparse


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """``--workers`` and the like, named as the arguments of ``fastreid_u.evaluate`` and ``fastreid_u.extract``."""
    parser.add_argument(
        "-j", "--workers", type=int, default=4,
        help="processes that read images; 0 reads in the main process (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--worker-start", choices=("fork", "forkserver", "spawn"),
        help="how workers start, with equal results (default: fork on Linux, else Python's own)",
    )  # fmt: skip
    parser.add_argument(
        "--truncated-images", action=argparse.BooleanOptionalAction,
        help="use images whose file ends early, as far as they go (default: as in training)",
    )  # fmt: skip
