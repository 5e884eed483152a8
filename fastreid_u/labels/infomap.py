# SPDX-License-Identifier: Apache-2.0
"""Infomap's labels: modules that a random walk on the graph of nearest neighbours stays in."""

from typing import ClassVar

from torch import Tensor

from fastreid_u.labels.generator import Advice, LabelGenerator, neighbours_and_images
from fastreid_u.ops.infomap_labels import infomap_labels


class InfomapLabels(LabelGenerator):
    """Reads ``k1``, ``min_similarity`` and ``min_size`` of the config. Needs the extra ``[infomap]``."""

    advice: ClassVar[Advice] = Advice(
        "Lower min_similarity or min_size, raise k1, or start from better weights",
        one_cluster="Raise min_similarity, or lower k1 to about the number of images that a person has",
    )

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        c = self.config
        return infomap_labels(features, k1=c.k1, min_similarity=c.min_similarity, min_size=c.min_size)

    def describe(self) -> str:
        c = self.config
        return f"Infomap, k1 {c.k1}, min_similarity {c.min_similarity}, min_size {c.min_size}"

    def scale(self) -> str:
        return neighbours_and_images(self.config.k1, self.images.count)
