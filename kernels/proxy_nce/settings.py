# SPDX-License-Identifier: Apache-2.0
"""The settings of the loss, the same for the forward, the backward and autograd."""

from typing import NamedTuple

BAD_CLUSTER = 4  # bit of `status`
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # tf32x3: three products of rounded halves, as accurate as float32
SCOPES, POSITIVES, REDUCTIONS = ("all", "camera"), ("all", "other_cameras"), ("mean", "camera", "sum", "none")


class Settings(NamedTuple):
    """What shapes the loss besides features, memory and their ids.

    The backward does not read ``hard_negatives``, ``ignore_index``, ``reduction`` and ``compat``: the forward has put
    them into what it hands on.
    """

    temperature: float = 0.07
    """divides the similarities"""
    hard_negatives: int | None = 50
    """how many; None takes all. The backward reads that many rows of the memory for each sample"""
    scope: str = "all"
    """"all", or "camera": a sample sees the proxies of its own camera only, all of them"""
    positives: str = "all"
    """"all", or "other_cameras" to leave out the proxy of the sample's own camera"""
    normalize: bool = True
    """scale the rows of ``x`` to unit length"""
    ignore_index: int = -1
    """cluster of samples that take no part"""
    reduction: str = "mean"
    """"mean" over the samples that take part, "camera" (over cameras the sum of means), "sum" or "none" """
    compat: bool = False
    """fill up a list of negatives that is too short with the last positives by index"""
    precision: str = "fp32"
    """"fp32" (split products on tensor cores) or "tf32" """
