# SPDX-License-Identifier: Apache-2.0
"""What all memories share: buffers that have a row per prototype, and any number of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastreid_u._checks import (
    require_features,
    require_ids,
    require_in_range,
    require_positive,
    require_positive_int,
    require_same_length,
)

Check = Callable[[str, str, Any], Any]  # of class, setting and value: the value, or an error


@contextmanager
def lasting(device: torch.device) -> Iterator[None]:
    """Tensors that are made inside lie on ``device``, and can be trained with also where inference mode is on."""
    with device, torch.inference_mode(False):
        yield


def optional(check: Check) -> Check:
    """``check``, but None is taken."""
    return lambda op, name, value: None if value is None else check(op, name, value)


class RowMemory(nn.Module):
    """A module whose buffers may have another number of rows in every epoch, and in every file that is loaded.

    ``load_state_dict`` takes over the number of rows that it finds. Rows of another length or dtype are an error, and
    so are buffers that do not have as many rows as each other.

    A setting, and rows that are assigned, are checked before they replace what is there. ``memory.features = x`` takes
    over the tensor ``x`` itself, which updates then change; finding what is not finite reads it once.

    Attributes:
        PER_ROW: names of the buffers that have one entry for each row.
        SETTINGS: how each setting is checked, in the constructor and where it is assigned later.
    """

    PER_ROW: ClassVar[tuple[str, ...]] = ("features",)
    SETTINGS: ClassVar[dict[str, Check]] = {
        "num_features": require_positive_int,
        "temp": require_positive,
        "momentum": partial(require_in_range, low=0, high=1),
    }

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.SETTINGS:
            value = self.SETTINGS[name](type(self).__name__, name, value)
        elif name in self.PER_ROW and name in self.__dict__.get("_buffers", {}):
            value = self._rows(name, value) if name == "features" else self._ids(name, value)
        super().__setattr__(name, value)

    def _rows(self, name: str, value: Any) -> Tensor:
        """``value`` itself, if it can stand for the rows."""
        op, width = type(self).__name__, self.features.shape[1]
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        require_features(op, name, value)
        if value.shape[1] != width:
            raise ValueError(f"{op}: {name} must have {width} columns, as num_features, got {value.shape[1]}")
        if value.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad, as updates change it, got requires_grad=True")
        if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
            raise ValueError(f"{op}: {name} must have memory of its own for each number, got an expanded tensor")
        if value.is_inference():  # which torch lets only inference mode change
            with torch.inference_mode(False):
                return value.clone()
        return value.detach() if isinstance(value, nn.Parameter) else value  # a parameter would be no buffer

    def _ids(self, name: str, value: Any) -> Tensor:
        """``value`` as integers beside the rows, one for each."""
        op = type(self).__name__
        ids = require_same_length(op, name, require_ids(op, name, value), "features", self.features)
        self._require_values(op, name, ids)
        return ids.to(self.features.device)

    def _require_values(self, op: str, name: str, value: Tensor) -> None:
        """Raise TypeError or ValueError unless ``value``, of the right form, can be in the buffer ``name``."""
        if value.is_floating_point():
            require_features(op, name, value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        kept = {name: own for name, own in self._buffers.items() if name not in self._non_persistent_buffers_set}
        loaded = {name: state_dict[prefix + name] for name in kept if prefix + name in state_dict}
        wrong = self._misfits({name: (kept[name], found) for name, found in loaded.items()})
        if wrong:
            error_msgs += [f"{type(self).__name__}.load_state_dict: {each}" for each in wrong]
            return
        try:
            for name, found in loaded.items():
                self._require_values(f"{type(self).__name__}.load_state_dict", name, found)
        except (TypeError, ValueError) as error:  # torch raises it with those of other modules
            error_msgs.append(str(error))
            return
        for name, found in loaded.items():
            if found.shape != kept[name].shape:
                self._buffers[name] = kept[name].new_empty(found.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _misfits(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
        """What is wrong with the found tensors, given (own, found) by name; the number of rows may be any."""
        wrong = [
            f"{name} must be a tensor, got {type(found).__name__}"
            for name, (_, found) in pairs.items()
            if not isinstance(found, Tensor)
        ] or [
            f"{name} must be {_form(own)}, got {tuple(found.shape)} {found.dtype}"
            for name, (own, found) in pairs.items()
            if found.ndim != own.ndim or found.shape[1:] != own.shape[1:] or found.dtype != own.dtype
        ]
        lengths = {name: len(pairs[name][1]) for name in self.PER_ROW if name in pairs} if not wrong else {}
        if len(set(lengths.values())) > 1:
            wrong.append(f"{', '.join(lengths)} must have as many rows, got {', '.join(map(str, lengths.values()))}")
        return wrong


def _form(buffer: Tensor) -> str:
    return f"({', '.join(['rows', *map(str, buffer.shape[1:])])}) {buffer.dtype}"
