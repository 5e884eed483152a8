# SPDX-License-Identifier: Apache-2.0
"""Does a refactoring change a result by a bit? Short runs of every method and calls of the ops, as digests in a file.

    python benchmarks/same_bits.py record before.json      # at the old commit
    python benchmarks/same_bits.py check before.json       # at the new one, on the same machine and the same packages

Only public names are used, so the same script runs at both commits. Of a training it takes each step's loss (heard in
``Tensor.backward``), each epoch's record without its seconds, the labels that the state keeps, and the network's
weights; of the ops their outputs and gradients on the stored golden inputs and on seeded ones. On one thread.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fastreid_u

GOLDEN = Path(fastreid_u.__file__).resolve().parents[1] / "tests" / "golden"
TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=4,
    epochs=3, workers=0, k1=8, k2=3, eps=0.6, center_per_camera=True, calibrate_bn=2, amp="off", seed=1,
    eval_step=1, quiet=True, device="cpu",
)  # fmt: skip
VIT = dict(arch="timm/test_vit", calibrate_bn=0, channels_last=False)
INFOMAP = dict(k1=15, min_size=2, min_similarity=0.2)
SOON = dict(inter_start=1)  # the loss between cameras
RUNS = {  # name: method, settings
    **{name: (name, {}) for name in fastreid_u.methods()},
    **{name: (name, SOON) for name in ("cap", "cap_cluster_contrast", "cap_cluster_contrast_proxy")},
    "vit_cluster_contrast": ("vit_cluster_contrast", VIT),
    "cluster_contrast_infomap": ("cluster_contrast_infomap", INFOMAP),
    "cluster_contrast, hard, two readers": ("cluster_contrast", dict(use_hard=True, workers=2, cache_images=True)),
    "cluster_contrast, one pass, sgd, bf16": ("cluster_contrast", dict(iters=0, optimizer="sgd", amp="bf16")),
    "cluster_contrast, groups": ("cluster_contrast", dict(bn_group=8, drop_path=0.0, warmup_epochs=2)),
    "cluster_contrast_uda, rows": (
        "cluster_contrast_uda",
        dict(reliability=True, unclustered="row", softmax="epsilon", source_refresh="every_epoch"),
    ),
    "spcl, refresh": ("spcl", dict(refresh=True)),
    "dccc, no teacher": ("dccc", dict(smooth=0.0, eps_scheduler="step")),
    "csa_hps, sequential": ("csa_hps", dict(update_rule="sequential", saa_steps=3)),
    "ice, without cameras": ("ice", dict(camera_weight=0.0)),
    **{f"{name}, compat": (name, dict(compat=True, **SOON)) for name in ("cap", "cap_cluster_contrast")},
    **{f"{name}, compat": (name, dict(compat=True)) for name in
       ("bmw", "cluster_contrast_uda", "ice", "spcl_uda", "cacl", "pplr", "pplr_camera")},
}  # fmt: skip


def digest(*values: object) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.sparse_csr:
                value = (value.crow_indices(), value.col_indices(), value.values())
            else:
                value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, tuple | list):
            found.update(digest(*value).encode())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:20]


def trained(method: str, settings: dict, worlds: tuple[Path, Path], folder: Path) -> dict[str, object]:
    """What a short run of ``method`` leaves."""
    from safetensors.torch import load_file

    from fastreid_u.data import load_dataset

    losses: list[float] = []
    backward = torch.Tensor.backward

    def hear(loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(loss, *args, **kwargs)

    torch.Tensor.backward = hear
    try:
        source = dict(source=str(worlds[1])) if method.endswith("_uda") else {}
        run = fastreid_u.train(
            load_dataset("market1501", worlds[0]), method=method, logs_dir=folder, **{**TINY, **source, **settings}
        )
    finally:
        torch.Tensor.backward = backward
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {name: load_file(folder / f"{name}.safetensors") for name in ("model_last", "model_best")}
    state = load_file(folder / "state.safetensors")
    labels = [tensor for name, tensor in sorted(state.items()) if name == "labels"]
    return {
        "losses": losses,
        "records": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "labels": digest(*labels),
        **{name: digest(*(t for _, t in sorted(tensors.items()))) for name, tensors in weights.items()},
        "optimizer": digest(*(t for name, t in sorted(state.items()) if name.startswith("optimizer."))),
        "model": digest(*(t for _, t in sorted(run.model.state_dict().items()))),
    }


def golden_inputs() -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as stored:
            for name in stored.files:
                array = stored[name]
                if (
                    array.ndim == 2
                    and array.dtype == np.float32
                    and array.shape[0] >= 40
                    and 16 <= array.shape[1] < 300
                ):
                    yield path.stem, torch.from_numpy(array)
                    break


def labelled(x: torch.Tensor) -> list[object]:
    """What the ops behind the labels make of any rows."""
    unit = F.normalize(x, dim=1)
    graph = fastreid_u.jaccard_graph(unit, k1=12, k2=4, radius=0.7)
    labels = fastreid_u.dbscan(graph, eps=0.6, min_samples=3)
    return [
        *fastreid_u.knn(unit, 7), graph, labels,
        fastreid_u.pseudo_labels(unit, eps=[0.5, 0.6], min_samples=3, k1=12, k2=4),
        fastreid_u.cluster_centroids(unit, labels), fastreid_u.jaccard_distance(unit[:60], k1=9, k2=3),
        fastreid_u.rerank(unit[:9], unit[9:40], k1=8, k2=3),
    ]  # fmt: skip


def stepped(x: torch.Tensor) -> list[object]:
    """Losses, gradients and moved memories of the ops of a step."""
    generator = torch.Generator().manual_seed(len(x))
    memory = F.normalize(torch.randn(23, x.shape[1], generator=generator), dim=1)
    targets = torch.randint(-1, 23, (len(x),), generator=generator)
    cameras = torch.randint(0, 3, (len(x),), generator=generator)
    found: list[object] = []
    for settings in ({}, {"focal": 2.0}, {"smoothing": 0.1, "epsilon": 0.0}, {"epsilon": 1e-6}):
        leaf = x.clone().requires_grad_()
        loss = fastreid_u.cluster_nce(leaf, targets, memory, **settings)
        loss.backward()
        found += [loss, leaf.grad]
    leaf = x.clone().requires_grad_()
    own = torch.arange(23)
    loss = fastreid_u.proxy_nce(leaf, targets.clamp(max=11), cameras, memory, own // 2, own % 3, hard_negatives=5)
    loss.backward()
    found += [loss, leaf.grad]
    for rule in ("sequential", "hard", "mean", "push"):
        moved = memory.clone()
        fastreid_u.momentum_update_(moved, x, targets, momentum=0.2, rule=rule)
        found.append(moved)
    for kind in (fastreid_u.ClusterMemory, fastreid_u.InstanceMemory):
        if kind is fastreid_u.ClusterMemory:
            one = kind.from_centroids(memory, momentum=0.2)
            rows = targets
        else:
            one = kind.from_features(x)
            one.set_labels(targets)
            rows = torch.arange(len(x))
        leaf = x.clone().requires_grad_()
        loss = one(leaf, rows)
        loss.backward()
        found += [loss, leaf.grad, one.features]
    ids = targets.clamp(min=0)
    metrics = fastreid_u.rank_metrics(x[:20], x[20:], ids[:20], ids[20:], cameras[:20], cameras[20:])
    return [*found, metrics.mAP, metrics.cmc, metrics.mINP]


def everything(wanted: list[str]) -> dict[str, object]:
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    if not wanted or "ops" in wanted:
        for name, x in golden_inputs():
            found[f"ops: {name}"] = {"labels": digest(*labelled(x)), "step": digest(*stepped(x[:200]))}
    with tempfile.TemporaryDirectory() as place:
        worlds = made_worlds(Path(place))
        for name, (method, settings) in RUNS.items():
            if wanted and name not in wanted and method not in wanted:
                continue
            try:
                found[name] = trained(method, settings, worlds, Path(place) / "run")
            except Exception as error:  # the same refusal at both commits is equality too
                found[name] = {"error": f"{type(error).__name__}: {error}".replace(place, "")}
            shutil.rmtree(Path(place) / "run", ignore_errors=True)
            print(f"{name}: {digest(json.dumps(found[name]))}", file=sys.stderr, flush=True)
    return found


def made_worlds(place: Path) -> tuple[Path, Path]:
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    size = dict(height=64, width=32, camera_presence=1.0, images_per_camera=4)
    own = SyntheticConfig(train_ids=6, test_ids=4, cameras=3, distractors=1, **size)
    other = SyntheticConfig(train_ids=6, test_ids=1, cameras=2, distractors=0, seed=1, **size)
    return generate(own, place / "world", workers=1), generate(other, place / "source", workers=1)


def differences(before: dict, after: dict) -> list[str]:
    found = []
    for name in sorted(after):
        if name not in before:
            found.append(f"{name}: not recorded before")
        elif before[name] != after[name]:
            parts = [k for k in {*before[name], *after[name]} if before[name].get(k) != after[name].get(k)]
            found.append(f"{name}: differs in {', '.join(sorted(parts))}")
            if "error" in parts:
                found.append(f"    {before[name].get('error')} | {after[name].get('error')}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("only", nargs="*", help="'ops', names of methods or of runs; default all")
    given = parser.parse_args()
    now = json.loads(json.dumps(everything(given.only)))
    if given.what == "record":
        given.file.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{len(now)} recorded")
        return 0
    found = differences(json.loads(given.file.read_text()), now)
    print("\n".join(found) or f"{len(now)} of {len(now)} equal to the bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
