# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    may_read,
    require_2d,
    require_choice,
    require_finite,
    require_floating,
    require_ids,
    require_in_range,
    require_positive,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u.ops._dispatch import choose, no_float64
from fastreid_u.ops.device_flag import flag
from fastreid_u.reference import momentum_update as reference

OP = "momentum_update_"
RULES = ("sequential", "hard", "mean", "weighted", "index", "row", "push", "push_sequential")


def momentum_update_(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    normalize: bool = True,
    weight_temperature: float | None = None,
    push_weight: float = 0.2,
    index: Tensor | None = None,
    labels: Tensor | None = None,
    cluster_sizes: Tensor | None = None,
    cluster_means: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``row = l2(momentum * row + (1 - momentum) * sample)`` in place; call it after backward.

    Args:
        memory: (C, D) floating point torch tensor that does not require grad; changed in place.
        x: (B, D) floating point on the same device, detached here.
        targets: (B,) integers, the row of ``memory`` that each sample moves; -1 moves none.
        momentum: weight of the OLD row, in [0, 1]. The published recipes use 0.1, so a row is mostly its last sample.
        rule: which samples f_i move a row m; similarities s_i = <f_i, m> are those before the batch.
            "sequential": all, in batch order, normalising after every one (Cluster Contrast).
            "hard": the one with the lowest s_i, the first such on ties (Cluster Contrast, ``use_hard``).
            "mean": their mean, once.
            "weighted": their mean with weights softmax(-s_i / weight_temperature), once (DCCC).
            "index": sample ``index[m]``, once (hardest by any measure of yours).
            "row": as "sequential", where rows are instances (SpCL, CACL); the means of their clusters follow.
            "push": pulled by the hardest and pushed from the most similar other row m', both weighted by how far and
            how near they are (BMW): l2(m - (1 - momentum) (1 - s_i) (m - f_i) - push_weight (1 + <m, m'>) (m + m')).
            "push_sequential": the same, but m' is looked for among the rows that the batch has moved already, in
            order of their first samples, as published; on a GPU there is only the reference for it.
        normalize: scale the samples to unit length first; False if the caller did, or as SpCL's published class.
        weight_temperature: of "weighted", positive; infinity gives the mean.
        push_weight: of the two "push" rules, at least 0.
        index: of "index": (C,) integers, the sample that moves each row, one of its own; -1 for none.
        labels: of "row", optional, with the next two: (C,) integers, the cluster of each row; -1 for none.
        cluster_sizes: (K,) integers, rows in each cluster.
        cluster_means: (K, D) floating point, the mean of each cluster's rows; changed in place with them. It gathers
            rounding errors: make it anew where ``labels`` change.
        found_inf: a tensor of one number on the same device, as of a gradient scaler; nothing is moved unless it is 0.
        backend: "auto", "triton" (one launch, "push" two), "numba" or "reference"; anything but "auto" runs there or
            raises.

    Returns:
        ``memory``. Rows that no target names keep their bits; a row whose new length is 0 becomes zeros. The bits of a
        moved row depend on that row and its own samples only, not on the rest of the batch ("push": and on m').
        Computed in float32 (float64 for a float64 memory), under autocast too; a half memory's rows are rounded once,
        at the end.
        Extra memory: on a GPU none, but for "push" 4 B D + B C / 4 bytes.

    Raises:
        TypeError, ValueError: wrong type, shape or value, a memory that requires grad, an argument of another rule.
        What needs a look at the data (targets, index or labels out of range, a cluster size of 0 where a row moves,
        unless ``found_inf`` is set NaN or infinity in ``x`` in the dtype of the computation) is seen on a CPU, and on
        a GPU with ``FASTREID_U_CHECK=1``; the memory is then untouched.
        Without it the Triton kernel reads nothing back: a target or label out of range leaves the memory untouched, a
        sample that is not finite leaves its row untouched, an index of another row's sample moves nothing, and
        ``fastreid_u.ops.device_flag.raise_flagged`` raises later.

    Dai et al., Cluster Contrast, ACCV 2022; Ge et al., SpCL, NeurIPS 2020; DCCC, ICASSP 2024; BMW, NeurIPS 2025.
    """
    op = OP
    if not isinstance(memory, Tensor):
        raise TypeError(f"{op}: memory must be a torch tensor, as it is changed in place, got {type(memory).__name__}")
    if memory.requires_grad:
        raise ValueError(f"{op}: memory must not require grad, as it is changed in place, got requires_grad=True")
    require_floating(op, "memory", require_2d(op, "memory", memory))
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x))).detach()
    targets = require_ids(op, "targets", targets)
    require_same_length(op, "targets", targets, "x", x)
    require_same_width(op, "x", x, "memory", memory)
    for name, other in (("x", x), ("targets", targets)):
        require_same_device(op, name, other, "memory", memory)
    if found_inf is not None:
        found_inf = as_tensor(op, "found_inf", found_inf)
        if found_inf.numel() != 1:
            raise ValueError(f"{op}: found_inf must hold one number, got shape {tuple(found_inf.shape)}")
        require_same_device(op, "found_inf", found_inf, "memory", memory)
    momentum = require_in_range(op, "momentum", momentum, 0, 1)
    require_choice(op, "rule", rule, RULES)
    push_weight = require_in_range(op, "push_weight", push_weight, 0, float("inf"), open_high=True)
    if rule == "weighted" or weight_temperature is not None:
        weight_temperature = _temperature(rule, weight_temperature)
    if rule == "index" or index is not None:
        index = _index(rule, index, memory)
    if not labels is cluster_sizes is cluster_means is None:
        labels, cluster_sizes = _clusters(rule, labels, cluster_sizes, cluster_means, memory)
    _momentum_update(
        memory, cluster_means, x, targets, momentum, rule, normalize, weight_temperature, push_weight, index, labels,
        cluster_sizes, found_inf, backend,
    )  # fmt: skip
    return memory


def _temperature(rule: str, value: object) -> float:
    if rule != "weighted" or value is None:
        need = "be given with" if value is None else "be None without"
        raise ValueError(f"{OP}: weight_temperature must {need} rule='weighted', got {value!r} and rule={rule!r}")
    return value if value == float("inf") else require_positive(OP, "weight_temperature", value)


def _index(rule: str, index: object, memory: Tensor) -> Tensor:
    if rule != "index" or index is None:
        need = "be given with" if index is None else "be None without"
        raise ValueError(f"{OP}: index must {need} rule='index', got rule={rule!r}")
    index = require_ids(OP, "index", index)
    require_same_length(OP, "index", index, "memory", memory)
    return require_same_device(OP, "index", index, "memory", memory)


def _clusters(rule: str, labels: object, sizes: object, means: object, memory: Tensor) -> tuple[Tensor, Tensor]:
    if rule != "row" or labels is None or sizes is None or means is None:
        raise ValueError(
            f"{OP}: labels, cluster_sizes and cluster_means must be given together and with rule='row', "
            f"got rule={rule!r} and {[value is not None for value in (labels, sizes, means)]} of them"
        )
    if not isinstance(means, Tensor):
        raise TypeError(f"{OP}: cluster_means must be a torch tensor, as it is changed in place, got {type(means)}")
    if means.requires_grad:
        raise ValueError(
            f"{OP}: cluster_means must not require grad, as it is changed in place, got requires_grad=True"
        )
    require_floating(OP, "cluster_means", require_2d(OP, "cluster_means", means))
    require_same_width(OP, "cluster_means", means, "memory", memory)
    labels, sizes = require_ids(OP, "labels", labels), require_ids(OP, "cluster_sizes", sizes)
    require_same_length(OP, "labels", labels, "memory", memory)
    require_same_length(OP, "cluster_sizes", sizes, "cluster_means", means)
    for name, other in (("labels", labels), ("cluster_sizes", sizes), ("cluster_means", means)):
        require_same_device(OP, name, other, "memory", memory)
    return labels, sizes


# Returns nothing: torch refuses an op that returns what it changed, so the wrapper above returns the memory.
@torch.library.custom_op("fastreid_u::momentum_update_", mutates_args=("memory", "cluster_means"))
def _momentum_update(
    memory: Tensor,
    cluster_means: Tensor | None,
    x: Tensor,
    targets: Tensor,
    momentum: float,
    rule: str,
    normalize: bool,
    weight_temperature: float | None,
    push_weight: float,
    index: Tensor | None,
    labels: Tensor | None,
    cluster_sizes: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    cannot = {"triton": no_float64(memory, x)}
    if rule == "push_sequential":
        cannot["triton"] = cannot["triton"] or "rows that wait for each other have no kernel; rule='push' has"
    if memory.dtype not in (torch.float32, torch.float64):
        cannot["numba"] = f"numba has no {memory.dtype}"
    elif cluster_means is not None and cluster_means.dtype != memory.dtype:
        cannot["numba"] = f"it wants cluster_means in the memory's {memory.dtype}"
    runs = {"triton": _triton, "numba": _numba, "reference": reference.momentum_update_}
    run = choose(OP, memory.device, backend, cannot=cannot, **runs)
    if found_inf is not None and memory.device.type == "cpu" and bool(found_inf.any()):
        return
    look = found_inf is None or memory.device.type == "cpu"  # else an overflow is its to skip
    if x.dtype == torch.float64 and memory.dtype != torch.float64:  # to what is computed in, where it may overflow
        x = x.float()
        if look:
            require_finite(OP, "x in float32", x)
    if run is not _numba or rule in ("index", "row"):  # numba looks by itself, in passing
        require_values_in(OP, "targets", targets, 0, memory.shape[0], ignore=-1)
    if run is not _numba and look:
        require_finite(OP, "x", x)
    if index is not None:
        _require_own_samples(index, targets)
    if labels is not None and may_read(labels):  # of the rows that move: all would take longer than the rest
        _require_clusters(labels[targets[targets >= 0]], cluster_sizes)
    with torch.autocast(memory.device.type, enabled=False):
        run(
            memory, x, targets, momentum=momentum, rule=rule, normalize=normalize,
            weight_temperature=weight_temperature, push_weight=push_weight, index=index, labels=labels,
            cluster_sizes=cluster_sizes, cluster_means=cluster_means, found_inf=found_inf,
        )  # fmt: skip


@_momentum_update.register_fake
def _(memory, cluster_means, x, targets, *settings) -> None:
    return None


def _require_own_samples(index: Tensor, targets: Tensor) -> None:
    """``index`` names no sample of another row; read on a GPU as ``require_values_in`` does."""
    if require_values_in(OP, "index", index, 0, targets.shape[0], ignore=-1).device.type == "cpu":
        rows = (index >= 0).nonzero()[:, 0]
        wrong = rows[targets[index[rows]] != rows]
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{OP}: index must name a sample of the row itself, got {int(index[row])} for row {row}, a sample of "
                f"row {int(targets[index[row]])}"
            )


def _require_clusters(labels: Tensor, sizes: Tensor) -> None:
    """The clusters of the rows that move exist and have rows to be the mean of."""
    require_values_in(OP, "labels", labels, 0, sizes.shape[0], ignore=-1)
    labels = labels[labels >= 0]
    empty = labels[sizes[labels] < 1]
    if len(empty):
        rule = "be at least 1 where a row moves"
        raise ValueError(f"{OP}: cluster_sizes must {rule}, got {int(sizes[empty[0]])} for label {int(empty[0])}")


def _triton(memory: Tensor, x: Tensor, targets: Tensor, **settings) -> None:
    from fastreid_u.kernels.momentum_update import momentum_update_ as launch

    launch(memory, x, targets, **settings, status=flag(OP, memory.device))


def _numba(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    *,
    index: Tensor | None,
    labels: Tensor | None,
    cluster_sizes: Tensor | None,
    cluster_means: Tensor | None,
    found_inf: Tensor | None,
    **settings,
) -> None:
    from fastreid_u.cpu import momentum_update as compiled

    rows, means = memory.contiguous(), None if cluster_means is None else cluster_means.contiguous()
    arrays = [rows.numpy(), x.to(memory.dtype).contiguous().numpy(), targets.contiguous().numpy()]
    named = {"index": index, "labels": labels, "cluster_sizes": cluster_sizes, "cluster_means": means}
    settings |= {name: tensor.contiguous().numpy() for name, tensor in named.items() if tensor is not None}
    status = compiled.momentum_update_(*arrays, **settings)
    if status == compiled.BAD_TARGET:
        require_values_in(OP, "targets", targets, 0, len(memory), ignore=-1)
    elif status == compiled.BAD_FEATURE:
        require_finite(OP, "x", x)
        compiled.momentum_update_(*arrays, **settings, trusted=True)  # finite, but its squares are not
    for changed, tensor in ((rows, memory), (means, cluster_means)):
        if changed is not tensor:
            tensor.copy_(changed)
