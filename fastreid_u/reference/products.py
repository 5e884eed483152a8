# SPDX-License-Identifier: Apache-2.0
"""Inner products whose gradient keeps its precision wherever backward runs."""

from __future__ import annotations

import torch
from torch import Tensor


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of (..., M, D) and (..., N, D), in their dtype: autocast changes neither it nor any derivative.

    Autocast acts on what runs under it, and ``loss.backward()`` under it would round the gradients of a plain product.
    """
    with torch.autocast(a.device.type, enabled=False):
        return (_Plain if torch.compiler.is_compiling() else _Transformable).apply(a, b)


class _Plain(torch.autograd.Function):
    """As much as torch.compile follows."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return (
            inner_products(grad, b.mT) if need_a else None,
            inner_products(grad.mT, a.mT) if need_b else None,
        )


class _Transformable(_Plain):
    """The same for the transforms of torch.func, forward derivatives included."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _Plain.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, da: Tensor | None, db: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        parts = [inner_products(*pair) for pair in ((da, b), (a, db)) if None not in pair]
        return sum(parts[1:], start=parts[0])
