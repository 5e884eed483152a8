# SPDX-License-Identifier: Apache-2.0
"""DBSCAN on the Jaccard distance of k-reciprocal neighbours, the labels of most methods of the family."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.labels.generator import Advice, LabelGenerator, neighbours_and_images
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.ranks import label_group


class DBSCANLabels(LabelGenerator):
    """Reads ``k1``, ``k2``, ``eps`` and ``min_samples`` of the config.

    Args:
        config, images: of ``LabelGenerator``.
        schedule: the radius of an epoch, where it changes; default ``config.eps`` in all epochs.
    """

    advice: ClassVar[Advice] = Advice(
        "Raise eps, lower min_samples or k1, or start from better weights",
        one_cluster="Lower eps, or k1 to about the number of images that a person has",
    )

    def __init__(self, config: Config, images: Images, schedule: Callable[[int], float] | None = None) -> None:
        super().__init__(config, images)
        self.schedule = schedule

    def eps(self, epoch: int) -> float:
        """DBSCAN's radius in ``epoch``."""
        return self.config.eps if self.schedule is None else self.schedule(epoch)

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        return self.clusterings(features, self.eps(epoch))

    def clusterings(self, features: Tensor, eps: float | Sequence[float], **settings: Any) -> Tensor:
        """Labels (n,) of ``features`` (n, D), or (len(eps), n) of several radii; ``settings`` as in the op."""
        c, group = self.config, label_group()
        if group is None and "knn" not in settings and c.k1 <= len(features):  # ranks share the search, without a hint
            settings["knn"] = self.nearest(features, c.k1)
        return pseudo_labels(features, eps=eps, min_samples=c.min_samples, k1=c.k1, k2=self.k2, group=group, **settings)

    @property
    def k2(self) -> int:
        """Rows averaged in query expansion: no more than a list has."""
        return min(self.config.k2, self.config.k1)

    def describe(self) -> str:
        c = self.config
        return f"k1 {c.k1}, k2 {self.k2}, eps {c.eps}, min_samples {c.min_samples}"

    def scale(self) -> str:
        return neighbours_and_images(self.config.k1, self.images.count)

    def settings(self, epoch: int) -> str:
        return f"eps {self.eps(epoch)}, min_samples {self.config.min_samples}, k1 {self.config.k1}"
