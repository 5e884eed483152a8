# SPDX-License-Identifier: Apache-2.0
"""Where a network runs and in which precision, the same for training, evaluation and extraction."""

from dataclasses import dataclass

import torch

from fastreid_u.engine.display import Display


@dataclass(frozen=True)
class Machine:
    """What networks run on, and where it is shown how far they are.

    Attributes:
        device: holds the networks; batches are copied there.
        autocast: whether forward passes for features run in bfloat16 where torch's autocast allows it.
        display: receives lines, warnings and progress.
        autocast_steps: the same of the forward passes of training.
    """

    device: torch.device
    autocast: bool
    display: Display
    autocast_steps: bool = False

    def precision(self, *, steps: bool = False) -> torch.autocast:
        """A context in which forward passes, for features or in ``steps``, run in the precision of this machine."""
        enabled = self.autocast_steps if steps else self.autocast
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def pick_device(op: str, device: str | torch.device | None) -> torch.device:
    """``device``, by default a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or it is not there; the message begins with ``op``.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # a CUDA build that is missing shows only here
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{op}: device must be cpu, cuda, cuda:1, ... and present, got {str(device)!r} ({reason})"
        ) from None
    return found


def uses_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether ``Config.amp`` means bfloat16 autocast on ``device``."""
    if amp == "auto":  # bfloat16 that the CPU only imitates is slower than float32
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return device.type == "cpu" and native is not None and native()
    return amp == "bf16"
