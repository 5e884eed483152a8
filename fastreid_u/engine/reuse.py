# SPDX-License-Identifier: Apache-2.0
"""Features of an evaluation that the extraction after it would compute again."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class KeptFeatures:
    """Features of all training images, from an evaluation that ranked just these, for the next extraction.

    They are handed out once, and only for the same network with the same parameters, buffers and plain attributes
    (such as the domain of a ``DomainNorm``), to the bit. Memory: the features, and a copy of the network's tensors,
    from an evaluation to the extraction after it.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def keep(self, network: nn.Module, features: Tensor) -> None:
        """Keep the ``features`` (N, D) that ``network`` gives as it is now."""
        copies = {name: tensor.detach().clone() for name, tensor in _tensors(network).items()}
        self._kept.append(_Kept(network, copies, _attributes(network), features))

    def take(self, network: nn.Module) -> Tensor | None:
        """The features of ``network``; None where there are none, or it has changed since."""
        for place, kept in enumerate(self._kept):
            if kept.network is network and kept.is_current():
                del self._kept[place]
                return kept.features
        return None

    def forget(self) -> None:
        self._kept.clear()


class _Kept(NamedTuple):
    """Features, the network that they are of, and what it was like."""

    network: nn.Module
    tensors: dict[str, Tensor]
    attributes: list[tuple[str, str, Any]]
    features: Tensor

    def is_current(self) -> bool:
        now = _tensors(self.network)
        return (
            self.attributes == _attributes(self.network)
            and self.tensors.keys() == now.keys()
            and all(tensor.equal(now[name]) for name, tensor in self.tensors.items())
        )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _attributes(network: nn.Module) -> list[tuple[str, str, Any]]:
    """Numbers and words that the modules hold; not whether they train, which an extraction sets itself."""
    return [
        (name, key, value)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key != "training"
    ]
