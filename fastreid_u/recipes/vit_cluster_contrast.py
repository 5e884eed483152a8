# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast on a vision transformer that was pre-trained on unlabelled images of people.

Luo et al.: Self-Supervised Pre-Training for Transformer-Based Person Re-Identification (TransReID-SSL), arXiv
2111.12084. What it adds: the backbone and its weights; the recipe is Cluster Contrast with the hard update and SGD.
The weights are its authors'. They are read from a file (``weights=``) and never fetched; results that start from
millions of images of people are not to be compared with those that start from ImageNet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastreid_u.config import RENDERED, changed
from fastreid_u.recipe import Images, Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

SCRIPTS = "published fine-tuning scripts (fc39e88)"
_UNSET = "person"


@dataclass(frozen=True, kw_only=True)
class ViTClusterContrastConfig(ClusterContrastConfig):
    """Defaults are those of the published Market-1501 script: ViT-S/16 on 4 GPUs."""

    arch = changed("timm/vit_small_patch16_224", "network, of timm", source=SCRIPTS)
    weights = changed(
        _UNSET, 'file of person-pretrained weights, to be given; "imagenet" = timm\'s, None = random', source=SCRIPTS
    )
    drop_path = changed(0.3, "stochastic depth of the last block, rising linearly from 0", source=SCRIPTS)
    pixel_norm = changed("half", source=SCRIPTS)
    use_hard = changed(True, source=SCRIPTS)
    momentum = changed(0.2, source=SCRIPTS)
    num_instances = changed(8, source=SCRIPTS)
    optimizer = changed("sgd", source=SCRIPTS)
    iters = changed(200, source=SCRIPTS)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "msmt17": {"eps": 0.7, "bn_group": 128, "eval_step": 50},  # on 2 GPUs, evaluated at the end
        "synthetic": {
            **RENDERED, "arch": "timm/vit_tiny_patch16_224", "temp": 0.1, "momentum": 0.8, "use_hard": False,
            "drop_path": 0.0, "optimizer": "adamw", "lr": 5e-4, "channels_last": False,
        },
    }  # fmt: skip


class ViTClusterContrast(ClusterContrast):
    name = "vit_cluster_contrast"
    paper = Paper("Cluster Contrast on a ViT")
    Config = ViTClusterContrastConfig

    def __init__(self, config: ViTClusterContrastConfig, images: Images) -> None:
        super().__init__(config, images)
        if config.weights == _UNSET:
            raise ValueError(
                "train: weights must name a file of person-pretrained weights for vit_cluster_contrast (they are not "
                'fetched), or be "imagenet" or None for another start, got none'
            )
