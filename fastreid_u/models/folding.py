# SPDX-License-Identifier: Apache-2.0
"""A network for features alone: each BatchNorm is folded into the layer before it.

In eval mode a BatchNorm is ``s * x + t`` per channel, with s and t from its weight, bias and running statistics. After
a convolution or a linear layer it is therefore the layer with weight ``s * W`` and bias ``s * b + t``. Which BatchNorm
follows which layer is not read from the modules' names: two images are run through the network, and every function that
touches a layer's output is watched. A BatchNorm is folded if it alone does.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastreid_u.models.batchnorm import plain_type

# What a copy of a module has of its own; values are shared.
_OWN = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@torch.no_grad()
def folded(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of ``network`` that gives the same rows up to rounding, with fewer passes over memory.

    * A BatchNorm1d or 2d, grouped, fused with an activation (timm's) or of the current domain, is folded into the
      Conv2d or Linear whose output it alone reads. Others (after a sum, a slice as in IBN, a pooling) stay.
    * The padding that timm's ``Conv2dSame`` adds to a map before each stride moves into the kernel, for images of the
      size of ``images``.

    ``network`` is not changed; what is not folded is shared with it, so the copy is of the network as it is now.
    Features differ by rounding, some 1e-6 in float32. Forward hooks are called for the watched run as well. A network
    that takes another way for a batch of two than for a larger one is not seen to.

    Args:
        network: in eval mode, on any device, of any floating dtype.
        images: (B, 3, H, W), of which the first two are run through the network.

    Memory: the folded layers' weights, once more.
    """
    if network.training:
        raise ValueError("folded: network must be in eval mode, got training mode")
    copy = _replica(network, {})
    watch = _Watch(copy)
    with _kept_state(copy):
        watch.run(copy, images[:2])  # of one, a squeeze without a dimension would make something else
    for layer, norm in watch.pairs():
        _fold(layer, norm)
    for layer, size in watch.padded():
        _pad_kernel(layer, size)
    return copy


def _replica(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with modules of its own that share all tensors; one that stands in two places stays one module."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in made:
        new = made[module] = object.__new__(type(module))  # some classes, as torch.fx's, have a __new__ of their own
        vars(new).update(vars(module))
        for name in _OWN:
            vars(new)[name] = vars(module)[name].copy()
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else _replica(child, made)
    return made[module]


@contextmanager
def _kept_state(copy: nn.Module) -> Iterator[None]:
    """Inside the block ``copy`` has buffers of its own; they and torch's random draws are forgotten afterwards."""
    modules = [m for m in copy.modules() if not isinstance(m, torch.jit.ScriptModule)]
    shared = [(m._buffers, dict(m._buffers)) for m in modules]
    for buffers, _ in shared:
        buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for buffers, before in shared:
            buffers.update(before)


class _Watch(TorchFunctionMode):
    """Sees which functions and modules read the outputs of layers while a network runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        modules = [m for m in network.modules() if not m._forward_hooks and not m._forward_pre_hooks]
        self._layers = [m for m in modules if type(m) in (nn.Conv2d, nn.Linear) or _pads_itself(m)]
        self._norms = [m for m in modules if isinstance(m, _BatchNorm) and _foldable(m)]
        self._weights: dict[int, list[nn.Module]] = {}  # by id of a weight, the layers that have it
        for layer in self._layers:
            for weight in layer.parameters(recurse=False):
                self._weights.setdefault(id(weight), []).append(layer)
        self._within: list[nn.Module] = []
        self._runs: dict[nn.Module, int] = {}
        # by id of a layer's output, which is kept, so that no other tensor takes its id: the layer, and who reads it
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}
        self._readers: dict[int, list[nn.Module | None]] = {}
        self._elsewhere: set[nn.Module] = set()  # layers whose weights something else reads
        self._sizes: dict[nn.Module, tuple[int, int]] = {}  # of the inputs of layers that pad these themselves

    def run(self, network: nn.Module, images: Tensor) -> None:
        """Run ``network`` once, watched."""
        hooks = []
        for module in self._layers + self._norms:
            hooks.append(module.register_forward_pre_hook(self._enters, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leaves))
        try:
            with self, _Operators(self):
                output = network(images)
            self._read(None, output)
        finally:
            for hook in hooks:
                hook.remove()

    def pairs(self) -> list[tuple[nn.Module, _BatchNorm]]:
        """Layers that ran once, each with the BatchNorm that ran once and alone read what the layer gave."""
        found = []
        for key, (layer, output) in self._made.items():
            norm = self._readers[key][0] if len(self._readers[key]) == 1 else None
            if norm is None or self._runs[norm] != 1 or not self._ours(layer):
                continue
            if output.ndim == (2 if isinstance(layer, nn.Linear) else 4) and output.shape[1] == norm.num_features:
                found.append((layer, norm))
        return found

    def padded(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """The ``Conv2dSame`` layers that ran once, each with the (height, width) of its input."""
        return [(layer, size) for layer, size in self._sizes.items() if self._ours(layer)]

    def _ours(self, layer: nn.Module) -> bool:
        """Whether the weights of ``layer`` were read by one run of it and by nothing else."""
        return self._runs[layer] == 1 and layer not in self._elsewhere

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.called(args, kwargs)
        return func(*args, **(kwargs or {}))

    def called(self, *given: Any) -> None:
        """A function was called with what is ``given``."""
        if not self._within:
            self._read(None, given)

    def _read(self, reader: nn.Module | None, given: Any) -> None:
        for value in tree_leaves(given):
            if id(value) in self._made:
                self._readers[id(value)].append(reader)
            else:
                self._elsewhere.update(self._weights.get(id(value), ()))

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._within:
            self._read(module if isinstance(module, _BatchNorm) else None, (args, kwargs))
        self._within.append(module)
        self._runs[module] = self._runs.get(module, 0) + 1
        if _pads_itself(module):
            self._sizes[module] = tuple(args[0].shape[-2:])

    def _leaves(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._within.pop()
        if not self._within and not isinstance(module, _BatchNorm):
            self._made[id(output)] = module, output
            self._readers[id(output)] = []


class _Operators(TorchDispatchMode):
    """Shows ``watch`` the operators that run, also those of scripted functions, which it does not see itself."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._watch.called(args, kwargs)
        return func(*args, **(kwargs or {}))


def _foldable(norm: _BatchNorm) -> bool:
    return plain_type(norm) is not None and norm.running_mean is not None and not norm.training


def _pads_itself(layer: nn.Module) -> bool:
    timm = sys.modules.get("timm.layers")  # not imported: a network of timm is here only if timm is
    return type(layer) is getattr(timm, "Conv2dSame", None)


def _fold(layer: nn.Conv2d | nn.Linear, norm: _BatchNorm) -> None:
    """Give ``layer`` the weight and bias that include ``norm``, which then passes its input on; exact in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    old = layer.weight
    weight = old.double() * scale.view(-1, *[1] * (old.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    _set(layer, weight.to(old.dtype), bias.to(old.dtype))
    norm.forward = _after(norm)


def _after(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """What ``norm`` still does: the activation of one that is fused with it."""
    if hasattr(norm, "act"):
        return lambda x: norm.act(norm.drop(x))
    return lambda x: x


def _pad_kernel(layer: nn.Conv2d, size: tuple[int, int]) -> None:
    """Move the padding of a ``Conv2dSame`` for inputs of ``size`` (height, width) into its kernel.

    The padding is as even as it can be, with the odd row or column at the end. One more of zeros at the front of the
    kernel makes it even, and an even padding costs no copy of the map.
    """
    padding, grow = [], []
    for length, kernel, stride, dilation in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max((math.ceil(length / stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
        if total % 2 and dilation > 1:
            return
        padding.append(total - total // 2)
        grow.append(total % 2)
    _set(layer, F.pad(layer.weight, (grow[1], 0, grow[0], 0)), layer.bias)
    layer.forward = lambda x: F.conv2d(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    old = layer.weight
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
