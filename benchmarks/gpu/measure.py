# SPDX-License-Identifier: Apache-2.0
"""One measurement a call, its figures printed as one line of JSON; benchmarks/gpu calls it.

PYTHONPATH=benchmarks python benchmarks/gpu/measure.py products
PYTHONPATH=benchmarks python benchmarks/gpu/measure.py --tiny cluster_contrast FOLDER  # on a CPU, to see that it runs
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu.smallest import smallest

ROUNDS = 20


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of a call; on a GPU of the device alone, between events."""
    for _ in range(3):
        run()
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def copy(device: torch.device, tiny: bool) -> dict:
    """Bytes read and written a second by a copy far larger than any cache."""
    size = 2**20 if tiny else 2**32
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"TB/s": 2 * size / seconds_of(lambda: target.copy_(source), device) / 1e12}


def products(device: torch.device, tiny: bool) -> dict:
    """Multiplications and additions a second of one product of square matrices, by the type that multiplies."""
    rates = {}
    for name, dtype, side in (
        ("fp16", torch.float16, 8192),
        ("bf16", torch.bfloat16, 8192),
        ("tf32", torch.float32, 8192),
        ("fp32", torch.float32, 8192),
        ("fp64", torch.float64, 4096),
    ):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(64 if tiny else side, 64 if tiny else side, device=device).to(dtype) for _ in range(2))
        rates[f"{name} TFLOP/s"] = 2 * len(a) ** 3 / seconds_of(lambda a=a, b=b: a @ b, device) / 1e12
    return rates


def dials(tiny: bool) -> dict:
    """Rendered people in about the numbers of Market-1501: 13,000 images to train on, 3,600 queries, 14,000 beside."""
    if tiny:
        return dict(train_ids=6, test_ids=4, cameras=3, images_per_camera=4, distractors=1, height=64, width=32)
    return dict(train_ids=751, test_ids=750, images_per_camera=4, camera_presence=0.72, height=256, width=128)


def render(device: torch.device, tiny: bool, folder: Path) -> dict:
    from fastreid_u.data import load_dataset

    begin = time.perf_counter()
    data = load_dataset("synthetic", folder / "data", **dials(tiny))
    counts = {"train": len(data.train), "query": len(data.query), "gallery": len(data.gallery)}
    return {"seconds": time.perf_counter() - begin, **counts}


def settings(tiny: bool) -> dict:
    """Cluster Contrast as published, but from random weights, which only cluster with camera means removed."""
    if tiny:
        small = dict(height=64, width=32, arch="resnet10", iters=2, batch_size=16, num_instances=4, k1=8, k2=3, eps=0.7)
        return dict(small, weights=None, bn_group=None, workers=0, epochs=2, device="cpu")
    return dict(
        height=256, width=128, arch="resnet50", weights=None, calibrate_bn=8, center_per_camera=True, color_jitter=0.2,
        iters=200, epochs=2, batch_size=256, num_instances=16, amp="bf16", channels_last=True, workers=14,
        cache_images=True, eval_step=2,
    )  # fmt: skip


def network(device: torch.device, tiny: bool, folder: Path) -> dict:
    """Images a second of forward and backward alone, on resident random data: what training cannot go above."""
    from fastreid_u.models import build_model

    chosen = settings(tiny)
    size = chosen["batch_size"], 3, chosen["height"], chosen["width"]
    model = build_model(chosen["arch"], weights=None).to(device).train()
    images = torch.randn(size, device=device)
    if chosen.get("channels_last"):
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=chosen.get("amp") == "bf16")

    def step() -> None:
        with mixed:
            loss = model(images).float().square().sum()
        loss.backward()
        model.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        with mixed:
            model(images)

    train_seconds = seconds_of(step, device, 3 if tiny else 10)
    model.eval()
    forward_seconds = seconds_of(forward, device, 3 if tiny else 10)
    return {"train images/s": size[0] / train_seconds, "extract images/s": size[0] / forward_seconds}


def cluster_contrast(device: torch.device, tiny: bool, folder: Path) -> dict:
    """Two epochs by phase, and what fifty of 200 steps would take at the second one's pace."""
    import fastreid_u

    chosen = settings(tiny)
    run = fastreid_u.train(
        "synthetic",
        root=folder / "data",
        data=dials(tiny),
        logs_dir=folder / "run",
        overwrite=True,
        quiet=True,
        **chosen,
    )
    seconds = run.last["seconds"]
    epoch = seconds["extract"] + seconds["label"] + seconds["fit"] * 200 / chosen["iters"]
    return {
        "extract s": seconds["extract"],
        "label s": seconds["label"],
        "fit s": seconds["fit"],
        "evaluate s": seconds.get("evaluate"),
        "fit images/s": chosen["iters"] * chosen["batch_size"] / seconds["fit"],
        "clusters": run.last.get("clusters"),
        "50 x 200 steps, minutes (projected)": 50 * epoch / 60,
    }


MEASUREMENTS: dict[str, Callable[..., dict]] = {
    "copy": copy,
    "products": products,
    "smallest": smallest,
    "render": render,
    "network": network,
    "cluster_contrast": cluster_contrast,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("folder", type=Path, nargs="?", help="for rendered data and runs, where one is needed")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else "cuda")
    arguments = [] if given.folder is None else [given.folder]
    print(json.dumps(MEASUREMENTS[given.measurement](device, given.tiny, *arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
