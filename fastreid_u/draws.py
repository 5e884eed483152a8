# SPDX-License-Identifier: Apache-2.0
"""NumPy's random generator as a module, so that a checkpoint holds how far it has drawn."""

import json

import numpy as np
import torch
from torch import Tensor, nn


class Draws(nn.Module):
    """A random generator whose ``state_dict`` goes on from the next draw, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.restart((0,))

    def restart(self, seed: tuple[int, ...]) -> None:
        """Draw from the beginning of ``seed``'s stream."""
        self._generator = np.random.default_rng(seed)

    def permutation(self, count: int) -> Tensor:
        """(count,) int64, the numbers 0 .. count - 1 in random order, on the CPU."""
        return torch.from_numpy(self._generator.permutation(count))

    def get_extra_state(self) -> Tensor:
        """(bytes,) uint8: NumPy's own description of the state, as JSON text."""
        text = json.dumps(self._generator.bit_generator.state)
        return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state of ``get_extra_state``."""
        self._generator.bit_generator.state = json.loads(bytes(state.tolist()))
