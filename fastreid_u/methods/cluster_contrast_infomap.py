# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast with Infomap's labels instead of DBSCAN's, as its second set of published commands has it.

Modules that a random walk on the graph of nearest neighbours stays in; better on large sets (MSMT17 31.2 instead of
27.6 mAP, arXiv 2103.11568 v3). Needs the extra ``[infomap]``, which is under the GPL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastreid_u import _env
from fastreid_u.config import RENDERED, Rule, at_least, changed, option
from fastreid_u.methods.cluster_contrast import COMMANDS, ClusterContrast, ClusterContrastConfig
from fastreid_u.ops.infomap_labels import infomap_labels
from fastreid_u.recipe import Images


@dataclass(frozen=True, kw_only=True)
class ClusterContrastInfomapConfig(ClusterContrastConfig):
    """``eps``, ``min_samples`` and ``k2`` are DBSCAN's and not used."""

    k1 = changed(15, "nearest neighbours an image may be linked to, itself included", source=COMMANDS)
    min_similarity: float = option(
        0.5, "cosine similarity that makes a link; published as eps", source=COMMANDS,
        rule=Rule("lie in (0, 1]", lambda v: 0 < v <= 1),
    )  # fmt: skip
    min_size: int = option(
        5, "images of the smallest cluster; published as k2 = 4, one less", source=COMMANDS, rule=at_least(1)
    )

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ClusterContrastConfig.PER_DATASET,
        "synthetic": {**RENDERED, "k1": 15, "temp": 0.1, "momentum": 0.8},
    }


class ClusterContrastInfomap(ClusterContrast):
    name = "cluster_contrast_infomap"
    title = "Cluster Contrast, Infomap labels"
    Config = ClusterContrastInfomapConfig
    if_none_cluster = "Lower min_similarity or min_size, raise k1, or start from better weights"
    if_all_cluster = "Raise min_similarity or lower k1"

    def __init__(self, config: ClusterContrastInfomapConfig, images: Images, source: Images | None = None) -> None:
        super().__init__(config, images, source)
        if not _env.infomap().present:  # now, rather than after the first extraction
            raise RuntimeError(f"train: infomap must be installed for {self.name}, got none: {_env.infomap().detail}")

    @classmethod
    def describe_labels(cls, config: ClusterContrastInfomapConfig) -> str:
        return f"Infomap, k1 {config.k1}, min_similarity {config.min_similarity}, min_size {config.min_size}"

    def label_settings(self, epoch: int) -> str:
        return self.describe_labels(self.config)

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        c = self.config
        return infomap_labels(features, k1=c.k1, min_similarity=c.min_similarity, min_size=c.min_size)
