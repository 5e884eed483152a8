# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u extract``."""

import argparse
import os
from pathlib import Path

from fastreid_u.cli.network import add_network_options, run_or_weights
from fastreid_u.cli.reading import add_reading_options


def extract(words: list[str]) -> None:
    """Write the features of a folder of crops to a NumPy .npz file."""
    parser = argparse.ArgumentParser(prog="fastreid-u extract", description=extract.__doc__)
    add_network_options(parser)
    parser.add_argument("images", help="folder of crops (every image below it), image, CSV, or a known set")
    parser.add_argument("--out", type=Path, default=Path("features.npz"), help="arrays: features (N, D), paths (N,)")
    add_reading_options(parser)
    given = vars(parser.parse_args(words))

    import numpy as np

    from fastreid_u.engine.checkpoint import write_whole
    from fastreid_u.engine.display import Display
    from fastreid_u.trained import extract as trained

    out = _writable(given.pop("out"))
    result = trained.extract(run_or_weights(given), given.pop("images"), quiet=False, **given)
    arrays = {"features": result.features.cpu().numpy(), "paths": np.array(result.paths)}
    write_whole(out, lambda file: np.savez(file, **arrays))  # a file, not a name: savez would add a suffix to that
    Display().line(f"{out}: {tuple(result.features.shape)} features, {len(result.bad)} unreadable")


def _writable(out: Path) -> Path:
    """Where features will lie: ``out`` with NumPy's suffix. What cannot be written is refused before the work."""
    out = out.expanduser()
    if not out.is_dir() and out.suffix != ".npz":
        out = out.with_name(out.name + ".npz")
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"extract: --out must be a file in an existing folder that can be written, got {out}")
    return out
