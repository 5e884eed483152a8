# SPDX-License-Identifier: Apache-2.0
"""What person-pretrained weights are to a transformer: ``vit_cluster_contrast`` from them and from random weights.

    python benchmarks/worlds/person_pretraining.py

The published weights come from millions of unlabelled crops of people. In their place stand rendered people of another
world, 256 of them with their identities, and a transformer of 0.3 million parameters, so that a CPU can do it.
Nothing is done twice: the weights and the runs lie in ``--logs``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from synthetic_difficulty import supervised

import fastreid_u
from fastreid_u.data import ReIDDataset, load_dataset
from fastreid_u.recipes.vit_cluster_contrast import ViTClusterContrast

OTHERS: dict[str, Any] = {"seed": 200, "train_ids": 256}
SMALL: dict[str, Any] = {"arch": "timm/test_vit", "amp": "off"}  # products this small are slower in bfloat16
LONG: dict[str, Any] = {"lr": 1e-3, "epochs": 40, "iters": 60, "step_size": 28, "color_jitter": 0.4, "eval_step": 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=0, help="seed of the people and cameras to learn")
    parser.add_argument("--logs", type=Path, default=Path("runs/person_pretraining"), help="run folders")
    options = parser.parse_args()
    others = load_dataset("synthetic", **OTHERS)
    pretrained = trained(
        others, supervised(others, ViTClusterContrast), options.logs / "weights", weights=None, **SMALL, **LONG
    )
    print(f"{'':33}{'mAP %':>8}{'top-1 %':>9}")
    row("its own test people", pretrained.last)
    for name, weights in (
        ("random weights", None),
        ("person-pretrained", options.logs / "weights" / "model_last.safetensors"),
    ):
        place = options.logs / f"world{options.world}-{name.replace(' ', '-')}"
        world = load_dataset("synthetic", seed=options.world)
        run = trained(world, ViTClusterContrast, place, weights=weights and str(weights), **SMALL)
        row(f"{name}, at the start", run.records[0])
        row(f"{name}, {run.config.epochs} epochs", run.last)
    return 0


def trained(dataset: ReIDDataset, method: type, folder: Path, **settings: Any) -> fastreid_u.Run:
    there = (folder / "state.safetensors").exists()
    return fastreid_u.train(
        dataset, method=method, logs_dir=folder, quiet=True, resume=there, overwrite=not there, **settings
    )


def row(name: str, record: dict[str, Any]) -> None:
    print(f"{name:33}{100 * record['mAP']:8.1f}{100 * record['top1']:9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
