# SPDX-License-Identifier: Apache-2.0
"""Features: the network in eval mode, in batches of training, rows kept in a dictionary by path and stacked again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from published.images import Sample, batches, plain_view


@torch.no_grad()
def extract(model: nn.Module, samples: Sequence[Sample], size: tuple[int, int], batch: int, workers: int) -> Tensor:
    """(N, D) in the order of ``samples``, as the network gives them: unit rows."""
    model.eval()
    numbers = [range(start, min(start + batch, len(samples))) for start in range(0, len(samples), batch)]
    found: dict[str, Tensor] = {}
    for images, paths, _, _, _ in batches(samples, plain_view(*size), workers, numbers):
        outputs = model(images).data.cpu()
        for path, output in zip(paths, outputs, strict=True):
            found[path] = output
    return torch.cat([found[sample.path].unsqueeze(0) for sample in samples], 0)
