# SPDX-License-Identifier: Apache-2.0
"""PPLR with camera ids: whole and parts are pulled to what other cameras have seen of their cluster.

Cho, Kim, Hong, Yoon: Part-based Pseudo Label Refinement for Unsupervised Person Re-identification, CVPR 2022.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastreid_u.config import changed
from fastreid_u.recipe import Paper
from fastreid_u.recipes.pplr import CODE, PPLR, PPLRConfig


@dataclass(frozen=True, kw_only=True)
class PPLRCameraConfig(PPLRConfig):
    """Defaults are those of the published code with cameras."""

    camera_weight = changed(0.5, "factor of the loss between cameras", source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = PPLRConfig.PER_DATASET | {
        "market1501": {"eps": 0.4},
        "msmt17": {"eps": 0.6, "camera_weight": 1.0},
    }


class PPLRCamera(PPLR):
    name = "pplr_camera"
    paper = Paper("PPLR with cameras")
    Config = PPLRCameraConfig
