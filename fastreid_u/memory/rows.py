# SPDX-License-Identifier: Apache-2.0
"""What all memories share: buffers that have a row per prototype, and any number of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@contextmanager
def lasting(device: torch.device) -> Iterator[None]:
    """Tensors that are made inside lie on ``device``, and can be trained with also where inference mode is on."""
    with device, torch.inference_mode(False):
        yield


class RowMemory(nn.Module):
    """A module whose buffers may have another number of rows in every epoch, and in every file that is loaded.

    ``load_state_dict`` takes over the number of rows that it finds. Rows of another length or dtype are an error, and
    so are buffers that do not have as many rows as each other.

    Attributes:
        PER_ROW: names of the buffers that have one entry for each row.
    """

    PER_ROW: ClassVar[tuple[str, ...]] = ("features",)

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
        for name, found in loaded.items():
            if found.shape != kept[name].shape:
                self._buffers[name] = kept[name].new_empty(found.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _misfits(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
        """What is wrong with the found tensors, given (own, found) by name; the number of rows may be any."""
        wrong = [
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
