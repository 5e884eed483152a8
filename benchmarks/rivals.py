# SPDX-License-Identifier: Apache-2.0
"""Other people's packages that benchmarks compare with: how each is installed, and why one does not take part."""

import importlib.util
from typing import NamedTuple

import torch


class Rival(NamedTuple):
    """A package: its title, the module that is imported, the name that pip installs it by, whether it needs a GPU."""

    title: str
    module: str
    pip: str
    gpu: bool


RIVALS = {
    "sklearn": Rival("scikit-learn", "sklearn", "scikit-learn", gpu=False),
    "faiss": Rival("faiss", "faiss", "faiss-cpu", gpu=False),
    "cuml": Rival("cuML", "cuml", "cuml-cu12", gpu=True),
    "cuvs": Rival("cuVS", "cuvs", "cuvs-cu12", gpu=True),
    "flashlib": Rival("FlashLib", "flashlib", "flashlib", gpu=True),
    "liger": Rival("Liger-Kernel", "liger_kernel", "liger-kernel", gpu=True),
    "cut_cross_entropy": Rival("cut-cross-entropy", "cut_cross_entropy", "cut-cross-entropy", gpu=True),
}


def why_not(name: str) -> str | None:
    """Why the rival ``name`` cannot run on this machine; None if it can, or is no package (torch, ours)."""
    rival = RIVALS.get(name)
    if rival is None:
        return None
    if rival.gpu and not torch.cuda.is_available():
        return f"{rival.title} needs a GPU"
    if importlib.util.find_spec(rival.module) is None:
        return f"{rival.title} is not installed: pip install {rival.pip}"
    return None
