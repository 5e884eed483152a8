# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast's recipe with CAP's memory in place of its own, the literal reading of their combination.

Dai et al., Cluster Contrast, ACCV 2022 (arXiv 2103.11568), appendix; see ``cap_cluster_contrast``.
"""

from dataclasses import dataclass

from fastreid_u.config import option
from fastreid_u.methods.cap_cluster_contrast import CAP_CODE, CAPClusterContrast, CAPClusterContrastConfig


@dataclass(frozen=True, kw_only=True)
class CAPClusterContrastProxyConfig(CAPClusterContrastConfig):
    cluster_weight: float = option(0.0, "factor of the loss over clusters")
    intra_weight: float = option(1.0, "factor of the loss within cameras", source=CAP_CODE)


class CAPClusterContrastProxy(CAPClusterContrast):
    name = "cap_cluster_contrast_proxy"
    title = "CAP + Cluster Contrast (proxies only)"
    Config = CAPClusterContrastProxyConfig
