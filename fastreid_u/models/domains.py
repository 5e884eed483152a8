# SPDX-License-Identifier: Apache-2.0
"""Domain-specific BatchNorm: every BatchNorm of a network twice, for labelled source and unlabelled target images.

SpCL's way to train on two domains at once: weights are shared, statistics and affine parameters of BatchNorm are not.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastreid_u._checks import require_choice

DOMAINS = ("source", "target")


class DomainNorm(nn.Module):
    """Two copies of one BatchNorm; ``domain`` chooses the one that the next forward uses ("target" at first).

    A frozen bias stays frozen in both (published SpCL makes the neck's trainable by accident).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.source = copy.deepcopy(norm)
        self.target = norm
        self.domain = "target"

    @property
    def weight(self) -> Tensor:
        """The current domain's; as a BatchNorm has it."""
        return (self.source if self.domain == "source" else self.target).weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.source if self.domain == "source" else self.target)(x)


def split_domains(model: nn.Module) -> None:
    """Replace every BatchNorm inside ``model`` by a ``DomainNorm``, in place; each pair starts equal."""
    for parent in [m for m in model.modules() if not isinstance(m, DomainNorm)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, DomainNorm(child))


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block ``model`` runs with the BatchNorms of domain ``name``, afterwards with the target's again."""
    require_choice("domain", "name", name, DOMAINS)
    norms = [m for m in model.modules() if isinstance(m, DomainNorm)]
    try:
        for norm in norms:
            norm.domain = name
        yield
    finally:
        for norm in norms:
            norm.domain = "target"


def single_domain(model: nn.Module, name: str = "target") -> nn.Module:
    """A copy of ``model`` with ordinary BatchNorms, those of domain ``name``: what is evaluated and saved."""
    require_choice("single_domain", "name", name, DOMAINS)
    single = copy.deepcopy(model)
    for parent in list(single.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, DomainNorm):
                setattr(parent, child_name, getattr(child, name))
    return single
