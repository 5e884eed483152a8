# SPDX-License-Identifier: Apache-2.0
"""Warnings of labels that training cannot learn from, read off the counts of ``health.py``; identities take no part.

The limits come from runs on real crops and rendered worlds. They are silent on runs whose ranking rose (also on those
that began with most images un-clustered, which many do) and warn of those that fell into a few large clusters.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from fastreid_u.labels.generator import LabelGenerator

LARGE = 0.2  # share of all images in one cluster, where there are many clusters
RUNNING_TOGETHER = (0.1, 0.75, 1.5)  # largest cluster's share; clusters against the most, largest against the smallest
UNCLUSTERED = 0.5
JUMP = 0.3  # rise of the un-clustered share within one epoch
UNSTEADY, UNSTEADY_EPOCHS = 0.25, 3  # agreement below this, in this many epochs running
WORSE = 1.5  # a warning is given again where its cause has grown by this factor

_COUNTS = {"epoch", "clusters", "unclustered", "largest", "agreement"}


class Finding(NamedTuple):
    """One cause for concern.

    Attributes:
        cause: its name.
        size: how bad it is, in units of its own; compared with earlier findings of the cause.
        text: the warning.
    """

    cause: str
    size: float
    text: str


class LabelWatch:
    """Follows a run's labels, and warns once for each cause and again where it has become much worse.

    Args:
        images: how many there are.
        labels: the generator, whose advice and settings the warnings give.
        uncentred: whether centring features per camera is left to try.
        before: records of finished epochs; a resumed run goes on as the unbroken one would.
    """

    def __init__(
        self, images: int, labels: LabelGenerator, *, uncentred: bool = False, before: Iterable[dict[str, Any]] = ()
    ) -> None:
        self.images = images
        self.labels = labels
        self.uncentred = uncentred
        self._seen: list[dict[str, Any]] = []
        self._warned: dict[str, float] = {}
        for record in before:
            if record.keys() >= _COUNTS:
                self.look(record)

    def look(self, record: dict[str, Any]) -> list[str]:
        """The lines to show for an epoch's ``record``: its number and the counts of ``label_health``."""
        self._seen.append(record)
        lines = []
        for found in filter(None, (find(self) for find in _CAUSES)):
            if found.size >= WORSE * self._warned.get(found.cause, 0.0):
                self._warned[found.cause] = found.size
                kind = "note" if found.cause == "first labels" else "warning"
                lines.append(f"{kind}: epoch {record['epoch']}: {found.text}")
        return lines

    def _merged(self) -> Finding | None:
        return self._one_cluster() or self._large_cluster() or self._running_together()

    def _one_cluster(self) -> Finding | None:
        if self._now["clusters"] != 1:
            return None
        text = "one cluster holds all clustered images, so its labels tell nobody apart"
        return Finding("one cluster", 1, f"{text}. {self._against_merging()}")

    def _large_cluster(self) -> Finding | None:
        clusters, share = self._now["clusters"], self._now["largest"] / max(self.images, 1)
        if clusters < 2 or share <= _large_share(clusters):
            return None
        text = f"the largest of {clusters} clusters holds {share:.0%} of the images, as if they were of one person"
        return Finding("large cluster", share, f"{text}. {self._against_merging()}")

    def _running_together(self) -> Finding | None:
        now, (share, fewer, larger) = self._now, RUNNING_TOGETHER
        most = max(record["clusters"] for record in self._seen)
        least = min(record["largest"] for record in self._seen)
        if now["clusters"] > fewer * most or now["largest"] < max(larger * least, share * self.images):
            return None
        text = (
            f"clusters run together: {now['clusters']} are left of {most}, and the largest has grown from {least} to "
            f"{now['largest']} images"
        )
        return Finding("running together", now["largest"], f"{text}. {self._against_merging()}")

    def _first_labels(self) -> Finding | None:
        share = self._now["unclustered"]
        if len(self._seen) > 1 or share <= UNCLUSTERED:
            return None
        text = f"{share:.0%} of the images are un-clustered, as is common in first labels. If the share does not fall:"
        remedy = self._against_noise()
        return Finding("first labels", 1, f"{text} {remedy[0].lower()}{remedy[1:]}")

    def _unclustered(self) -> Finding | None:
        if len(self._seen) < 2:
            return None
        before, share = self._seen[-2]["unclustered"], self._now["unclustered"]
        if before <= UNCLUSTERED or share <= UNCLUSTERED or share < 0.9 * before:
            return None
        text = f"{share:.0%} of the images are un-clustered, after {before:.0%} in the epoch before"
        return Finding("un-clustered", 1 / max(1 - share, 1e-9), f"{text}. {self._against_noise()}")

    def _jump(self) -> Finding | None:
        if len(self._seen) < 2:
            return None
        before, share = self._seen[-2]["unclustered"], self._now["unclustered"]
        if share - before < JUMP:
            return None
        text = f"the share of un-clustered images rose from {before:.1%} to {share:.1%} within one epoch"
        return Finding("jump", share - before, f"{text}. {self._against_noise()}")

    def _unsteady(self) -> Finding | None:
        last = [record["agreement"] for record in self._seen[-UNSTEADY_EPOCHS:]]
        if len(last) < UNSTEADY_EPOCHS or any(value is None or value >= UNSTEADY for value in last):
            return None
        values = ", ".join(f"{value:.2f}" for value in last)
        text = f"labels are made almost anew in each epoch (they agree with the ones before by {values}; 1 = equal)"
        return Finding("unsteady", 1, f"{text}. Start from better weights, lower lr, or: {self._against_merging()}")

    @property
    def _now(self) -> dict[str, Any]:
        return self._seen[-1]

    def _against_merging(self) -> str:
        centring = " or try center_per_camera=True" if self.uncentred else ""
        return f"{self.labels.advice.one_cluster} (now {self._settings()}){centring}"

    def _against_noise(self) -> str:
        return f"{self.labels.advice.no_cluster} (now {self._settings()})"

    def _settings(self) -> str:
        return self.labels.settings(self._now["epoch"])


_CAUSES = (
    LabelWatch._merged,
    LabelWatch._first_labels,
    LabelWatch._unclustered,
    LabelWatch._jump,
    LabelWatch._unsteady,
)


def _large_share(clusters: int) -> float:
    """The share of all images beyond which the largest of ``clusters`` is too large.

    Few clusters are large ones, so the limit is three even shares, but never nearer to all images than half-way
    between an even share and all: 0.75 of two clusters, 0.6 of five, 0.3 of ten, ``LARGE`` from 15 on.
    """
    even = 1 / clusters
    return max(LARGE, min(3 * even, (1 + even) / 2))
