# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 (the imports below are for type checkers and editors)
"""Unsupervised person re-identification: exact, sparse, fast; every published method as a short recipe.

    import fastreid_u
    run = fastreid_u.train("synthetic")

Names are imported when first used, so ``import fastreid_u`` probes no GPU, compiles nothing and costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastreid_u.engine.train import Run, train
    from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory
    from fastreid_u.ops.batch_hard_triplet import batch_hard_triplet
    from fastreid_u.ops.centroids import cluster_centroids, proxy_centroids
    from fastreid_u.ops.cluster_nce import cluster_nce
    from fastreid_u.ops.cosine_align import cosine_align
    from fastreid_u.ops.dbscan import dbscan
    from fastreid_u.ops.dbscan_estimator import DBSCAN
    from fastreid_u.ops.ema_update import ema_update_
    from fastreid_u.ops.infomap_labels import infomap_labels
    from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
    from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
    from fastreid_u.ops.knn import knn
    from fastreid_u.ops.momentum_update import momentum_update_
    from fastreid_u.ops.neighbour_overlap import neighbour_overlap
    from fastreid_u.ops.proxy_nce import proxy_nce
    from fastreid_u.ops.pseudo_labels import pseudo_labels
    from fastreid_u.ops.rank_metrics import rank_metrics
    from fastreid_u.ops.refine_clusters import refine_clusters
    from fastreid_u.ops.reliable_clusters import reliable_clusters
    from fastreid_u.ops.rerank import rerank
    from fastreid_u.ops.segment_attention import segment_attention
    from fastreid_u.ops.segments import segment_mean, segment_sum
    from fastreid_u.ops.suggest_eps import suggest_eps
    from fastreid_u.recipe import Recipe
    from fastreid_u.recipes import methods
    from fastreid_u.trained.evaluate import evaluate
    from fastreid_u.trained.extract import extract
    from fastreid_u.trained.model import load_model

_HOME = {
    "train": "engine.train",
    "Run": "engine.train",
    "evaluate": "trained.evaluate",
    "extract": "trained.extract",
    "load_model": "trained.model",
    "Recipe": "recipe",
    "methods": "recipes",
    "ClusterMemory": "memory",
    "InstanceMemory": "memory",
    "ProxyMemory": "memory",
    "knn": "ops.knn",
    "k_reciprocal_encoding": "ops.k_reciprocal",
    "jaccard_graph": "ops.jaccard",
    "jaccard_distance": "ops.jaccard",
    "dbscan": "ops.dbscan",
    "DBSCAN": "ops.dbscan_estimator",
    "pseudo_labels": "ops.pseudo_labels",
    "infomap_labels": "ops.infomap_labels",
    "reliable_clusters": "ops.reliable_clusters",
    "refine_clusters": "ops.refine_clusters",
    "cluster_centroids": "ops.centroids",
    "proxy_centroids": "ops.centroids",
    "segment_sum": "ops.segments",
    "segment_mean": "ops.segments",
    "cluster_nce": "ops.cluster_nce",
    "momentum_update_": "ops.momentum_update",
    "proxy_nce": "ops.proxy_nce",
    "batch_hard_triplet": "ops.batch_hard_triplet",
    "cosine_align": "ops.cosine_align",
    "ema_update_": "ops.ema_update",
    "neighbour_overlap": "ops.neighbour_overlap",
    "segment_attention": "ops.segment_attention",
    "rank_metrics": "ops.rank_metrics",
    "rerank": "ops.rerank",
    "suggest_eps": "ops.suggest_eps",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastreid-u")
    if name not in _HOME:
        raise AttributeError(f"module 'fastreid_u' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastreid_u.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
