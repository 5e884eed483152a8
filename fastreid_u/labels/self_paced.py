# SPDX-License-Identifier: Apache-2.0
"""SpCL's labels: DBSCAN's clusters, as far as a slightly tighter and a slightly looser clustering agree with them."""

import math

import torch
from torch import Tensor

from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.ops.reliable_clusters import reliable_clusters


class SelfPacedLabels(DBSCANLabels):
    """Reads ``eps_gap`` and ``keep`` of the config besides DBSCAN's settings.

    The buffer ``bar`` () float64 is the least independence of a cluster, from the first epoch that has clusters; NaN
    before. Source: Ge et al., SpCL, NeurIPS 2020.
    """

    def __init__(self, config: Config, images: Images) -> None:
        super().__init__(config, images)
        self.register_buffer("bar", torch.tensor(math.nan, dtype=torch.float64))

    @property
    def threshold(self) -> float | None:
        """The bar as a number, None while there is none."""
        bar = self.bar.item()
        return None if math.isnan(bar) else bar

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        eps, gap = self.eps(epoch), self.config.eps_gap
        found = reliable_clusters(
            *self.clusterings(features, [eps, eps - gap, eps + gap]),
            threshold=self.threshold, keep=self.config.keep, singletons=False,
        )  # fmt: skip
        if found.threshold is not None:
            self.bar.fill_(found.threshold)
        return found.labels

    def describe(self) -> str:
        return f"{super().describe()}, clusters that eps -+ {self.config.eps_gap} agree with"
