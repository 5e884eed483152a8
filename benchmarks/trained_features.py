# SPDX-License-Identifier: Apache-2.0
"""Trained networks, and features with their spectrum, for the benchmarks that depend on them; made once, then read.

    python benchmarks/trained_features.py          # make what is missing: about ten minutes on two cores
    python benchmarks/trained_features.py --where  # the files, whether they exist or not

Two networks learn Cluster Contrast on the demo's rendered people: ``resnet10`` (256 numbers an image) and a bottleneck
ResNet with one block a stage (2048 numbers). Both then describe people of another world, who stand person by person, as
in Market-1501: the first n rows are n images of n / 19 people, so fewer rows are a smaller set of the same kind.

The files lie in ``$FASTREID_U_CACHE``, or in ``~/.cache/fastreid_u`` where that is not set, as rendered sets do. They
are the same on one machine with one set of packages, up to the rounding of its BLAS.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1  # part of the files' names: raise it when anything below changes the features
COMMAND = "python benchmarks/trained_features.py"
BOTTLENECK = "resnet14_2048"
LEARNT: dict[str, Any] = {}  # dials of the world to learn from: the demo's
OTHERS = dict(train_ids=2_620, test_ids=0, distractors=0, seed=77)  # 50,000 images; the demo's seed is 0


@dataclass(frozen=True)
class Kind:
    """How features of one width are made."""

    rows: int
    arch: str
    settings: dict[str, Any] = field(default_factory=dict)  # on top of the demo's


KINDS = {
    256: Kind(50_000, "resnet10"),
    2048: Kind(12_936, BOTTLENECK, dict(lr=1e-3, epochs=16)),
}


def cache() -> Path:
    return Path(os.environ.get("FASTREID_U_CACHE") or "~/.cache/fastreid_u").expanduser()


def file_of(d: int) -> Path:
    """Where the features of ``d`` numbers lie.

    Raises:
        ValueError: no network here gives ``d`` numbers.
    """
    if d not in KINDS:
        raise ValueError(f"trained_features: d must be one of {', '.join(map(str, KINDS))}, got {d!r}")
    return cache() / f"trained-features-v{VERSION}-{d}.npy"


def load(n: int, d: int) -> np.ndarray:
    """The first ``n`` rows, (n, d) float32 of unit length.

    Raises:
        ValueError: ``d`` is not 256 or 2048, or there are fewer than ``n`` rows.
        FileNotFoundError: not made yet; the message has the command that makes them.
    """
    path = file_of(d)
    if not 0 < n <= KINDS[d].rows:
        raise ValueError(f"trained_features: n must lie in [1, {KINDS[d].rows}] for d = {d}, got {n!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no trained features of {d} numbers in the cache yet; make them: {COMMAND}")
    return np.array(np.load(path, mmap_mode="r")[:n])


@contextmanager
def bottleneck() -> Iterator[None]:
    """Have the library build the network of 2048 numbers, which is none of its own."""
    from fastreid_u.models.resnet import RESNETS, ResNetSpec

    RESNETS[BOTTLENECK] = ResNetSpec(True, (1, 1, 1, 1), width=64)
    try:
        yield
    finally:
        del RESNETS[BOTTLENECK]


def network(d: int, *, quiet: bool = False) -> Path:
    """The weights of the network that gives ``d`` numbers; trained where the cache has none."""
    import fastreid_u

    path, kind = file_of(d).with_suffix(".safetensors"), KINDS[d]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as logs:
            told = dict(root=cache(), data=LEARNT, logs_dir=Path(logs) / "run", quiet=quiet)
            with bottleneck():
                run = fastreid_u.train("synthetic", arch=kind.arch, **told, **kind.settings)
            (run.folder / "model_last.safetensors").replace(path)
    return path


def make(d: int, *, quiet: bool = False) -> Path:
    """Train, render, extract, and store; files that exist are kept."""
    import fastreid_u
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    path, rows = file_of(d), KINDS[d].rows
    if path.is_file():
        return path
    world = generate(SyntheticConfig(**OTHERS), cache())
    images = sorted((world / "bounding_box_train").iterdir())[:rows]
    weights = network(d, quiet=quiet)
    with bottleneck():
        features = fastreid_u.extract(weights, images).features.float().cpu().numpy()
    if features.shape != (rows, d):
        raise ValueError(f"trained_features: expected {rows} x {d} numbers, got {features.shape}")
    part = path.with_suffix(".part.npy")
    np.save(part, features)
    part.replace(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="print the files' paths and make nothing")
    parser.add_argument("--quiet", action="store_true", help="do not show the trainings")
    parser.add_argument("d", type=int, nargs="*", default=list(KINDS), help="widths to make (default: both)")
    given = parser.parse_args()
    for d in given.d:
        print(file_of(d) if given.where else make(d, quiet=given.quiet), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
