# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss over camera-aware proxies and their hardest negatives, forward and backward (Triton).

Stands alone: needs torch and triton, nothing else; copy this folder to use it elsewhere.
Method: Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI 2021.
Oracle: fastreid_u/reference/proxy_nce.py.  Cost: 2 B Q D multiply-adds forward; backward reads |P| + k rows a sample.

The logits l = l2(x) @ memory.T / T are written once. One program a sample then reads its row: it finds the k-th largest
negative digit by digit (four histograms of 256 bins over the bits, which order floats once the sign is undone), the
log-sum-exp over positives and chosen negatives, and a list of the chosen. With P the positives and p the softmax

    d loss / d x = (sum_j c_j memory_j / T - x̂ slope) / |x|,   c_j = p_j - [j in P] / |P|,   slope = sum_j c_j l_j

x̂ = x / |x|; the slope is the part along x̂, which the normalisation removes. The backward gathers the few rows whose c
is not 0. Where all negatives count there is no list: it multiplies by the whole memory, making c again from the logits.

Nothing is accumulated by atomics and no tile depends on the device: equal inputs give equal bits.
"""

import torch

from .backward import proxy_nce_bwd
from .forward import proxy_nce_fwd
from .settings import BAD_CLUSTER, POSITIVES, PRECISIONS, REDUCTIONS, SCOPES, Settings

__all__ = ["BAD_CLUSTER", "Settings", "proxy_nce", "proxy_nce_bwd", "proxy_nce_fwd"]


def proxy_nce(
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    *,
    status: torch.Tensor | None = None,
    **settings,
) -> torch.Tensor:
    """``-mean over P of log softmax(l2(x) @ memory.T / temperature)``, the softmax over P and H; gradient to ``x``.

    P: the proxies of a sample's cluster. H: the ``hard_negatives`` most similar of the others; of equals at the edge
    the first by index.

    Args:
        x: (B, D) float32, float16 or bfloat16.
        clusters: (B,) integers, or ``ignore_index``. One without a proxy makes the loss NaN.
        cameras: (B,) integers.
        memory: (Q, D), the same choice of dtypes, Q >= 1; no gradient flows to it.
        proxy_clusters, proxy_cameras: (Q,) integers.
        status: (1,) int32, or-ed with ``BAD_CLUSTER`` if a sample has no proxy to go to.
        settings: fields of ``Settings``.

    Returns the float32 loss. Memory beyond inputs and gradients: 4 B Q + 4 B hard_negatives bytes.
    """
    settings = Settings(**settings)
    _check(x, clusters, cameras, memory, proxy_clusters, proxy_cameras, settings)
    return _ProxyNCE.apply(x, clusters, cameras, memory, proxy_clusters, proxy_cameras, settings, status)


class _ProxyNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):
        *tensors, ctx.settings, status = given
        loss, *left = proxy_nce_fwd(*tensors, ctx.settings, status=status)
        ctx.save_for_backward(*tensors, *left)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return proxy_nce_bwd(grad, *ctx.saved_tensors, ctx.settings), *(None,) * 7


def _check(
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    settings: Settings,
) -> None:
    shapes = x.shape[:1], x.shape[:1], memory.shape[:1], memory.shape[:1]
    ids = clusters, cameras, proxy_clusters, proxy_cameras
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or tuple(i.shape for i in ids) != shapes:
        got = ", ".join(str(tuple(each.shape)) for each in (x, memory, *ids))
        raise ValueError(f"proxy_nce: x, memory and ids must be (B, D), (Q, D), twice (B,), twice (Q,), got {got}")
    if len(memory) == 0:
        raise ValueError(f"proxy_nce: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, tensor in (("x", x), ("memory", memory)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"proxy_nce: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    for name, value, choices in (
        ("scope", settings.scope, SCOPES),
        ("positives", settings.positives, POSITIVES),
        ("reduction", settings.reduction, REDUCTIONS),
        ("precision", settings.precision, PRECISIONS),
    ):
        if value not in choices:
            raise ValueError(f"proxy_nce: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
