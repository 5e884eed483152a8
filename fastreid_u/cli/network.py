# SPDX-License-Identifier: Apache-2.0
"""The options of ``evaluate`` and ``extract`` that name a network, with a run or without."""

import argparse


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add them; those of a network without a run are absent from the namespace where they are not given."""
    parser.add_argument(
        "run",
        help="run folder or model_*.safetensors; with --arch a file of weights, imagenet, or None for random ones",
    )
    parser.add_argument("--which", choices=("last", "best"), default="last", help="default: last")
    parser.add_argument("--amp", choices=("off", "bf16", "auto"), help="precision (default: the run's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default a GPU if there is one)")
    alone = parser.add_argument_group("a network without a run, as for train")
    alone.add_argument("-a", "--arch", help="network")
    for name, kind in (("height", int), ("width", int), ("pooling-type", str), ("pixel-norm", str)):
        alone.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    for name in ("stem-relu", "channels-last"):
        alone.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)


def run_or_weights(given: dict) -> str | None:
    """Take ``run`` from the options ``given``; with an ``arch`` the word None means random weights."""
    run = given.pop("run")
    return None if given["arch"] is not None and run.lower() == "none" else run
