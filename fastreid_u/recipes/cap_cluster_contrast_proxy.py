# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast's recipe with CAP's memory in place of its own, the literal reading of their combination.

Dai et al., Cluster Contrast, ACCV 2022 (arXiv 2103.11568), appendix; see ``cap_cluster_contrast``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastreid_u.config import changed
from fastreid_u.recipe import Paper
from fastreid_u.recipes.cap_cluster_contrast import CAP_CODE, CAPClusterContrast, CAPClusterContrastConfig

_OF_CLUSTERS = ("temp", "momentum", "use_hard")


@dataclass(frozen=True, kw_only=True)
class CAPClusterContrastProxyConfig(CAPClusterContrastConfig):
    cluster_weight = changed(0.0)
    intra_weight = changed(1.0, "factor of the loss within cameras", source=CAP_CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = CAPClusterContrastConfig.PER_DATASET | {
        "synthetic": {
            name: value
            for name, value in CAPClusterContrastConfig.PER_DATASET["synthetic"].items()
            if name not in _OF_CLUSTERS
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if self.cluster_weight == 0 and field.name in _OF_CLUSTERS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"config: {field.name} must be left alone without a memory of clusters (cluster_weight 0; the "
                    f"proxies have proxy_temp and proxy_momentum), got {getattr(self, field.name)!r}"
                )


class CAPClusterContrastProxy(CAPClusterContrast):
    name = "cap_cluster_contrast_proxy"
    paper = Paper("CAP + Cluster Contrast (proxies only)", published=False, compat=True)
    Config = CAPClusterContrastProxyConfig
