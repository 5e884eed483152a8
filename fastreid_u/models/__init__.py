# SPDX-License-Identifier: Apache-2.0
"""Networks: images in, one row of unit length per image out.

Importing this package imports torch only; torchvision and timm are imported when a network is built.
"""

from fastreid_u.models.batchnorm import (
    GroupBatchNorm1d,
    GroupBatchNorm2d,
    calibrate_batchnorm,
    group_sizes,
    set_bn_group,
)
from fastreid_u.models.build import build_model, model_names
from fastreid_u.models.domains import domain, single_domain, split_domains
from fastreid_u.models.pooling import POOLINGS, GeM
from fastreid_u.models.reid import ReIDModel
from fastreid_u.models.weight_files import read_weights
from fastreid_u.models.weights import WeightsReport, load_weights

__all__ = [
    "POOLINGS",
    "GeM",
    "GroupBatchNorm1d",
    "GroupBatchNorm2d",
    "ReIDModel",
    "WeightsReport",
    "build_model",
    "calibrate_batchnorm",
    "domain",
    "group_sizes",
    "load_weights",
    "model_names",
    "read_weights",
    "set_bn_group",
    "single_domain",
    "split_domains",
]
