# SPDX-License-Identifier: Apache-2.0
"""CACL's labels: DBSCAN's clusters without the members that a tighter clustering splits off."""

from torch import Tensor

from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.ops.refine_clusters import refine_clusters


class RefinedLabels(DBSCANLabels):
    """Reads ``eps_gap``, ``refinement`` and ``ratio`` of the config besides DBSCAN's settings.

    Source: Li et al., CACL, IEEE TIP 2022.
    """

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        c, eps = self.config, self.eps(epoch)
        nearest = self.nearest(features, c.k1)  # both steps measure with the same lists
        labels, tight = self.clusterings(features, [eps, eps - c.eps_gap], knn=nearest)
        return refine_clusters(
            features, labels, tight,
            rule=c.refinement, ratio=c.ratio, singletons=False, k1=c.k1, k2=self.k2, knn=nearest,
        )  # fmt: skip

    def describe(self) -> str:
        c = self.config
        tight = f", refined by eps {c.eps - c.eps_gap:g} ({c.refinement})"
        return super().describe() + ("" if c.refinement == "none" else tight)
