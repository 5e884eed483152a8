# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against camera-aware proxies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    may_read,
    require_2d,
    require_choice,
    require_floating,
    require_ids,
    require_int,
    require_positive,
    require_positive_int,
    require_same_device,
    require_same_length,
    require_same_width,
)
from fastreid_u.ops._dispatch import choose, first_derivative_only, no_float64
from fastreid_u.ops.device_flag import flag
from fastreid_u.reference import proxy_nce as reference

OP = "proxy_nce"


def proxy_nce(
    x: Tensor,
    clusters: Tensor,
    cameras: Tensor,
    memory: Tensor,
    proxy_clusters: Tensor,
    proxy_cameras: Tensor,
    *,
    temperature: float = 0.07,
    hard_negatives: int | None = 50,
    scope: str = "all",
    positives: str = "all",
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    compat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Every sample towards the proxies of its cluster, away from the hardest others.

    A proxy is one row of ``memory``: what one camera saw of one cluster. With ``l = l2(x) @ memory.T / temperature``,
    the loss of a sample is ``-(1/|P|) sum over p in P of log(exp(l_p) / sum over P and H of exp(l_q))``, where

        P   the proxies of its cluster, in all cameras or, with positives="other_cameras", in all but its own
        H   of the proxies of other clusters the ``hard_negatives`` most similar; all of them if there are fewer

    With scope="camera" only the proxies of the sample's own camera exist for it and H is all of the others.

        CAP     proxy_nce(..., scope="camera", reduction="camera") + 0.5 * proxy_nce(..., reduction="camera")
        ICE     0.5 * proxy_nce(..., reduction="camera")
        PPLR    0.5 * proxy_nce(..., positives="other_cameras")

    Args:
        x: (B, D) floating point, any device. Raw network outputs: they are normalised here.
        clusters: (B,) integers, the cluster of each sample, or ``ignore_index``.
        cameras: (B,) integers; any numbers, they need not be contiguous.
        memory: (Q, D) floating point proxies, Q >= 1, in any order, used as they are (unit rows, usually); must not
            require grad.
        proxy_clusters: (Q,) integers, the cluster of each proxy.
        proxy_cameras: (Q,) integers, its camera.
        temperature: divides the similarities; positive.
        hard_negatives: size of H; None takes all. Equally similar proxies at the edge may come in or not, whichever;
            the loss is the same. Of no effect with scope="camera".
        scope: "all" or "camera".
        positives: "all" or "other_cameras". A sample whose cluster only its own camera has seen then has the loss 0 and
            still counts in the mean.
        normalize: scale the rows of ``x`` to unit length first; False if the caller did. A row of zeros stays zero.
        ignore_index: cluster of samples that take no part; whatever else they hold, their gradient is zero.
        reduction: "mean" over the samples that take part; "camera", the sum over the cameras in the batch of the mean
            over the samples of each, which grows with the number of cameras (CAP, ICE); "sum"; or "none" for (B,) with
            zeros at samples that take no part. With no sample left all are 0 with zero gradients.
        compat: where fewer than ``hard_negatives`` proxies of other clusters exist, fill up with positives, which are
            then twice in the denominator, as published code does.
        backend: "auto", "triton" (three launches forward, one or two backward) or "reference"; anything but "auto" runs
            there or raises.

    Returns:
        The loss, float32 (float64 for float64 inputs), on ``x``'s device, differentiable with respect to ``x``.
        Computed in float32 also under autocast. Memory: the reference a dozen times B x Q; Triton 4 B Q bytes.

    Raises:
        TypeError, ValueError: wrong type, shape or value. A sample of whose cluster there is no proxy (scope "camera":
        none in its camera) is seen on a CPU, and on a GPU with ``FASTREID_U_CHECK=1``; without it the loss of that
        sample is NaN, nothing is read back, and ``fastreid_u.ops.device_flag.raise_flagged`` raises later.

    Wang et al., CAP, AAAI 2021; Chen et al., ICE, ICCV 2021; Cho et al., PPLR, CVPR 2022.
    """
    op = OP
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    memory = require_floating(op, "memory", require_2d(op, "memory", as_tensor(op, "memory", memory)))
    require_same_width(op, "memory", memory, "x", x)
    require_same_device(op, "memory", memory, "x", x)
    if len(memory) == 0:
        raise ValueError(f"{op}: memory must have at least one row, got shape {tuple(memory.shape)}")
    if memory.requires_grad:
        raise ValueError(f"{op}: memory must not require grad, as none flows to it, got requires_grad=True")
    clusters = _ids("clusters", clusters, "x", x)
    cameras = _ids("cameras", cameras, "x", x)
    proxy_clusters = _ids("proxy_clusters", proxy_clusters, "memory", memory)
    proxy_cameras = _ids("proxy_cameras", proxy_cameras, "memory", memory)
    temperature = require_positive(op, "temperature", temperature)
    if hard_negatives is not None:
        hard_negatives = require_positive_int(op, "hard_negatives", hard_negatives)
    ignore_index = require_int(op, "ignore_index", ignore_index)
    require_choice(op, "scope", scope, ("all", "camera"))
    require_choice(op, "positives", positives, ("all", "other_cameras"))
    if scope == "camera" and positives == "other_cameras":
        raise ValueError(f"{op}: positives must be 'all' with scope='camera', got {positives!r}")
    require_choice(op, "reduction", reduction, ("mean", "camera", "sum", "none"))
    _require_proxies(clusters, cameras, proxy_clusters, proxy_cameras, scope, ignore_index)

    cannot = {"triton": no_float64(x, memory)}
    run = choose(op, x.device, backend, cannot=cannot, triton=_triton, reference=reference.proxy_nce)
    return run(
        x,
        clusters,
        cameras,
        memory,
        proxy_clusters,
        proxy_cameras,
        temperature=temperature,
        hard_negatives=hard_negatives,
        scope=scope,
        positives=positives,
        normalize=normalize,
        ignore_index=ignore_index,
        reduction=reduction,
        compat=compat,
    )


def _ids(name: str, ids: Tensor, other_name: str, other: Tensor) -> Tensor:
    """Cluster or camera numbers, one for each row of ``other`` and beside it."""
    ids = require_ids(OP, name, ids)
    require_same_length(OP, name, ids, other_name, other)
    return require_same_device(OP, name, ids, other_name, other)


def _require_proxies(
    clusters: Tensor, cameras: Tensor, proxy_clusters: Tensor, proxy_cameras: Tensor, scope: str, ignore_index: int
) -> None:
    """Every sample that takes part has a proxy to go to; read on a GPU as the other checks of values do."""
    if not may_read(clusters):
        return
    there = clusters[:, None] == proxy_clusters[None, :]
    if scope == "camera":
        there &= cameras[:, None] == proxy_cameras[None, :]
    lost = (clusters != ignore_index) & ~there.any(dim=1)
    if lost.any():
        b = int(lost.nonzero()[0])
        place = f" in camera {int(cameras[b])}" if scope == "camera" else ""
        raise ValueError(
            f"{OP}: clusters must have a proxy each{' in the camera of the sample' if place else ''}, "
            f"got cluster {int(clusters[b])}{place} without one (sample {b})"
        )


def _triton(*tensors: Tensor, **settings) -> Tensor:
    loss, *_ = _proxy_nce(*tensors, **settings)
    return loss


@torch.library.custom_op("fastreid_u::proxy_nce", mutates_args=())
def _proxy_nce(
    x: Tensor,
    clusters: Tensor,
    cameras: Tensor,
    memory: Tensor,
    proxy_clusters: Tensor,
    proxy_cameras: Tensor,
    temperature: float,
    hard_negatives: int | None,
    scope: str,
    positives: str,
    normalize: bool,
    ignore_index: int,
    reduction: str,
    compat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and for the backward the logits, statistics of each sample, and which negatives were chosen."""
    from fastreid_u.kernels.proxy_nce import Settings, proxy_nce_fwd

    settings = Settings(
        temperature=temperature, hard_negatives=hard_negatives, scope=scope, positives=positives, normalize=normalize,
        ignore_index=ignore_index, reduction=reduction, compat=compat,
    )  # fmt: skip
    tensors = x, clusters, cameras, memory, proxy_clusters, proxy_cameras
    return proxy_nce_fwd(*tensors, settings, status=flag(OP, x.device))


@_proxy_nce.register_fake
def _(
    x, clusters, cameras, memory, proxy_clusters, proxy_cameras, temperature, hard_negatives, scope, positives,
    normalize, ignore_index, reduction, compat,
):  # fmt: skip
    b, q = x.shape[0], memory.shape[0]  # len() would fix the sizes under torch.compile
    k = 0 if hard_negatives is None or scope == "camera" else torch.sym_min(hard_negatives, q)
    loss = x.new_empty((b,) if reduction == "none" else (), dtype=torch.float32)
    stats, logits = (x.new_empty(shape, dtype=torch.float32) for shape in ((5, b), (b, q)))
    chosen, counts = (x.new_empty(shape, dtype=torch.int32) for shape in ((b, k), (2, b)))
    return loss, logits, stats, chosen, counts


@torch.library.custom_op("fastreid_u::proxy_nce_backward", mutates_args=())
def _proxy_nce_backward(
    grad: Tensor,
    x: Tensor,
    clusters: Tensor,
    cameras: Tensor,
    memory: Tensor,
    proxy_clusters: Tensor,
    proxy_cameras: Tensor,
    logits: Tensor,
    stats: Tensor,
    chosen: Tensor,
    counts: Tensor,
    temperature: float,
    scope: str,
    positives: str,
    normalize: bool,
) -> Tensor:
    """The gradient to ``x``."""
    from fastreid_u.kernels.proxy_nce import Settings, proxy_nce_bwd

    settings = Settings(temperature=temperature, scope=scope, positives=positives, normalize=normalize)
    tensors = x, clusters, cameras, memory, proxy_clusters, proxy_cameras
    return proxy_nce_bwd(grad, *tensors, logits, stats, chosen, counts, settings)


@_proxy_nce_backward.register_fake
def _(grad, x, *_):
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, _, ctx.scope, ctx.positives, ctx.normalize, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # the logits get no gradient, not even zeros


def _backward(ctx, grad, *_):
    nothing = (None,) * 13
    if grad is None:
        return None, *nothing
    settings = ctx.temperature, ctx.scope, ctx.positives, ctx.normalize
    return _proxy_nce_backward(grad, *ctx.saved_tensors, *settings), *nothing


_proxy_nce.register_autograd(_backward, setup_context=_remember)
_proxy_nce_backward.register_autograd(first_derivative_only(OP))
