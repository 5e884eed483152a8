# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast with Infomap's labels instead of DBSCAN's, as its second set of published commands has it.

Modules that a random walk on the graph of nearest neighbours stays in; better on large sets (MSMT17 31.2 instead of
27.6 mAP, arXiv 2103.11568 v3). Needs the extra ``[infomap]``, which is under the GPL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastreid_u import _env
from fastreid_u.config import RENDERED, Rule, at_least, changed, option
from fastreid_u.labels.infomap import InfomapLabels
from fastreid_u.recipe import Images, Paper
from fastreid_u.recipes.cluster_contrast import COMMANDS, ClusterContrast, ClusterContrastConfig


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
    paper = Paper("Cluster Contrast, Infomap labels")
    Config = ClusterContrastInfomapConfig

    def __init__(self, config: ClusterContrastInfomapConfig, images: Images) -> None:
        super().__init__(config, images)
        if not _env.infomap().present:  # now, rather than after the first extraction
            raise RuntimeError(f"train: infomap must be installed for {self.name}, got none: {_env.infomap().detail}")
        self.labels = InfomapLabels(config, images)
