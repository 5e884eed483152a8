# SPDX-License-Identifier: Apache-2.0
"""P x K sampling: streams of image indices in which the images of one identity stand together.

A sampler visits every identity once a pass, in random order, and emits a group for each; ``iterations`` cuts the flat
stream into an epoch's batches. Negative labels (un-clustered images) are skipped. All draws come from one NumPy
generator made from (seed, epoch). ``list(sampler)`` is one pass of ``len(sampler)`` indices, the next iteration the
next pass.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np


class IdentitySampler(ABC):
    """Common part; a subclass chooses the images of one identity: K of them, or it overrides ``__len__`` too.

    Args:
        labels: (N,) integers, an identity or cluster for each image; negative ones are skipped.
        num_instances: K, images per identity.
        seed, epoch: where the random generator starts.
    """

    def __init__(self, labels: Sequence[int], num_instances: int, *, seed: int = 0, epoch: int = 0) -> None:
        labels = np.asarray(labels)
        name = type(self).__name__
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name}: labels must be (N,) integers, got {labels.shape} {labels.dtype}")
        if num_instances < 1:
            raise ValueError(f"{name}: num_instances must be positive, got {num_instances}")
        self.num_instances = num_instances
        self.rng = np.random.default_rng((seed, epoch))
        kept = np.flatnonzero(labels >= 0)
        kept = kept[np.argsort(labels[kept], kind="stable")]
        starts = np.flatnonzero(np.diff(labels[kept])) + 1
        self.members = np.split(kept, starts) if len(kept) else []  # image indices of each identity, ascending

    def __iter__(self) -> Iterator[int]:
        for i in self.rng.permutation(len(self.members)):
            yield from self.group(self.members[i]).tolist()

    def __len__(self) -> int:
        """Number of indices of one pass, the same for every pass."""
        return len(self.members) * self.num_instances

    @abstractmethod
    def group(self, members: np.ndarray) -> np.ndarray:
        """Indices to emit for an identity whose images are ``members``."""


class RandomMultipleGallery(IdentitySampler):
    """An anchor and K - 1 images of the same identity from other cameras (SpCL, Cluster Contrast, CACL, DCCC).

    The anchor is uniform over the identity's images. Its mates come only from other cameras if there are any, else
    from the identity's other images; without replacement if there are at least K of them - K, not K - 1, as
    published. An identity with a single image emits that image once, which shifts the groups behind it against the
    batch borders, as in published code.

    Args:
        labels: (N,) integers; negative ones are skipped.
        camids: (N,) integers, or None to ignore cameras.
        num_instances: K.
        seed, epoch: where the random generator starts.
    """

    def __init__(
        self,
        labels: Sequence[int],
        camids: Sequence[int] | None,
        num_instances: int,
        *,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(labels, num_instances, seed=seed, epoch=epoch)
        self.camids = None if camids is None else _camids(self, camids, labels)

    def __len__(self) -> int:
        return sum(self.num_instances if len(members) > 1 else 1 for members in self.members)

    def group(self, members: np.ndarray) -> np.ndarray:
        anchor = members[self.rng.integers(len(members))]
        mates = members[members != anchor]
        if self.camids is not None:
            elsewhere = mates[self.camids[mates] != self.camids[anchor]]
            mates = elsewhere if len(elsewhere) else mates
        if len(mates) == 0:
            return np.array([anchor])
        replace = len(mates) < self.num_instances
        return np.concatenate([[anchor], self.rng.choice(mates, self.num_instances - 1, replace=replace)])


class ClassUniformly(IdentitySampler):
    """K images of a class, which in CAP is a (cluster, camera) proxy: K different ones, or K draws from the list
    written K times (so less repetition than drawing with replacement)."""

    def group(self, members: np.ndarray) -> np.ndarray:
        if len(members) < self.num_instances:
            members = np.tile(members, self.num_instances)
        return self.rng.permutation(members)[: self.num_instances]


class MoreCamera(IdentitySampler):
    """As many cameras as possible in a group of always exactly K (ICE).

    One random image from every camera of the identity; K of these if there are more, else topped up from its images
    not yet taken, with replacement only where these are too few.
    """

    def __init__(
        self,
        labels: Sequence[int],
        camids: Sequence[int],
        num_instances: int,
        *,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(labels, num_instances, seed=seed, epoch=epoch)
        self.camids = _camids(self, camids, labels)

    def group(self, members: np.ndarray) -> np.ndarray:
        shuffled = self.rng.permutation(members)
        first = np.unique(self.camids[shuffled], return_index=True)[1]  # of every camera, a uniform image
        taken, rest = shuffled[first], np.delete(shuffled, first)
        missing = self.num_instances - len(taken)
        if missing <= 0:
            return self.rng.choice(taken, self.num_instances, replace=False)
        if len(rest) == 0:
            return self.rng.choice(taken, self.num_instances, replace=True)
        return np.concatenate([taken, self.rng.choice(rest, missing, replace=len(rest) < missing)])


def _camids(sampler: IdentitySampler, camids: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    camids = np.asarray(camids)
    if camids.shape != (len(labels),):
        raise ValueError(f"{type(sampler).__name__}: camids must have one entry per label, got {camids.shape}")
    return camids


def iterations(sampler: IdentitySampler, iters: int | None, batch_size: int) -> list[list[int]]:
    """An epoch's batches: ``iters`` full ones, or, for None, those of one pass.

    Of ``iters`` batches a new pass starts where the old one cannot fill another batch; what is left of a pass is
    dropped. A pass shorter than one batch has no full batch at all (published code stops with an error); its identities
    are then used again until the batch is full, with one warning. Of one pass the last batch is left out if it is not
    full, unless it is the only one.

    Memory: one integer per image shown.

    Raises:
        ValueError: ``iters`` batches of a sampler that has no identity.
    """
    stream = list(sampler)
    if iters is None:
        full = len(stream) // batch_size * batch_size or len(stream)
        return [stream[i : i + batch_size] for i in range(0, full, batch_size)]
    if not stream:
        raise ValueError("iterations: sampler must have at least one identity, got none (every label is negative)")
    short = len(stream) < batch_size
    if short:
        # No counts that change with every epoch: Python shows an equal warning once.
        warnings.warn(
            f"too few clusters to fill a batch of {batch_size}: identities repeat within a batch",
            RuntimeWarning,
            stacklevel=2,
        )
    batches = []
    for _ in range(iters):
        if len(stream) < batch_size and not short:
            stream = list(sampler)
        while len(stream) < batch_size:
            stream += list(sampler)
        batches.append(stream[:batch_size])
        stream = stream[batch_size:]
    return batches
