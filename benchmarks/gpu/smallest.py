# SPDX-License-Identifier: Apache-2.0
"""Every kernel on shapes that fill no block, once and quickly: for the sanitizer, under which everything is slow."""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

import fastreid_u
from fastreid_u.kernels import cluster_nce as cluster_nce_kernels
from fastreid_u.kernels.knn import cascade
from fastreid_u.kernels.knn.short_rows import short_rows
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding


def smallest(device: torch.device, tiny: bool = False) -> dict:
    """Runs them on ``device`` and says how much there was; wrong results are for the tests to find."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(8, 33, generator=generator)
    x = centre[torch.randint(8, (65,), generator=generator)] + 0.3 * torch.randn(65, 33, generator=generator)
    x = F.normalize(x).to(device)
    labels = label_kernels(x)
    step_kernels(x, generator)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"rows": len(x), "clusters": int(labels.max()) + 1}


def label_kernels(x: Tensor) -> Tensor:
    fastreid_u.knn(x, 3, gallery=x[:50])
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":  # a search chooses by size
        out = torch.empty(65, 3, device=x.device), torch.empty(65, 3, dtype=torch.int64, device=x.device)
        for width in (64, 256):
            cascade.search(x, x, short_rows(x, width, *torch.aminmax(x, dim=0)), True, None, *out)
    k_reciprocal_encoding(x, 9, 3)
    graph = fastreid_u.jaccard_graph(x, k1=9, k2=3, radius=0.7)
    fastreid_u.jaccard_distance(x, 9, 3)
    labels = fastreid_u.dbscan(graph, [0.5, 0.6], 4)
    for min_samples in (1, 6):  # without and with the table of counts
        fastreid_u.pseudo_labels(x, k1=9, k2=3, min_samples=min_samples)
    assert torch.equal(labels, fastreid_u.pseudo_labels(x, eps=[0.5, 0.6], k1=9, k2=3))
    fastreid_u.rerank(x[:20], x[20:], 8, 3)
    fastreid_u.rerank(x[:20], x[20:], 8, 3, top=5)
    people = torch.arange(65) % 8
    fastreid_u.rank_metrics(x[:20], x[20:], people[:20], people[20:])
    fastreid_u.rank_metrics(None, None, people[:20], people[20:], distmat=torch.cdist(x[:20], x[20:]))
    return labels[0]


def step_kernels(x: Tensor, generator: torch.Generator) -> None:
    memory = F.normalize(torch.randn(7, 33, generator=generator)).to(x.device)
    targets = torch.randint(7, (10,), generator=generator).to(x.device)
    batch, teacher = x[:10], x[10:20]
    losses = (
        {},
        {"teacher": teacher, "teacher_weight": 0.3, "smoothing": 0.1},
        {"extra_target": torch.rand(10, 7, generator=generator).to(x.device), "extra_weight": 0.5},
        {"focal": 2.0, "epsilon": 1e-6, "class_mask": torch.ones(7, dtype=torch.bool, device=x.device)},
    )
    for dtype in (torch.float32, torch.float16):
        for settings in losses:
            rows, prototypes = (t.to(dtype, copy=True).requires_grad_() for t in (batch, memory))
            settings = {k: v.to(dtype) if k == "teacher" else v for k, v in settings.items()}
            fastreid_u.cluster_nce(rows, targets, prototypes, **settings).backward()
    many = F.normalize(torch.randn(600, 33, generator=generator)).to(x.device)  # enough to split among programs
    triton_runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    for lean in (False, True) if triton_runs else ():  # the op chooses by size
        cluster_nce_kernels.cluster_nce(
            batch.clone().requires_grad_(), targets, many.clone().requires_grad_(), lean=lean
        ).backward()
    for proxies, settings in (
        (memory, {}), (memory, {"scope": "camera"}), (memory, {"positives": "other_cameras", "hard_negatives": 2}),
        (memory, {"compat": True}), (many, {"hard_negatives": None}),
    ):  # fmt: skip
        clusters, cameras = (
            torch.arange(len(proxies), device=x.device) // 2,
            torch.arange(len(proxies)).to(x.device) % 2,
        )
        rows = batch.clone().requires_grad_()
        fastreid_u.proxy_nce(
            rows, clusters[targets], cameras[targets], proxies, clusters, cameras, **settings
        ).backward()
    clusters = torch.arange(7, device=x.device) // 2
    own = torch.full((7,), -1).to(targets)
    own[targets] = torch.arange(10, device=x.device)  # one of its samples for each row
    means, sizes = torch.zeros(4, 33, device=x.device), torch.bincount(clusters, minlength=4)
    for rule, settings in {
        "sequential": {}, "hard": {}, "mean": {}, "weighted": {"weight_temperature": 0.1},
        "index": {"index": own}, "row": {"labels": clusters, "cluster_sizes": sizes, "cluster_means": means},
        "push": {"push_weight": 0.2},
    }.items():  # fmt: skip
        fastreid_u.momentum_update_(memory, batch, targets, rule=rule, **settings)
    assert math.isfinite(memory.sum().item())
