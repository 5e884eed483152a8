# SPDX-License-Identifier: Apache-2.0
"""Work on the CPU whatever device ``torch.set_default_device`` has named."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_cpu() -> Iterator[None]:
    """In the block, or the decorated function, tensors that are made without ``device=`` lie on the CPU."""
    if torch.get_default_device().type == "cpu":  # nothing to change, and torch's mode costs time at every call
        yield
        return
    with torch.device("cpu"):
        yield
