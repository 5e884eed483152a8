# SPDX-License-Identifier: Apache-2.0
"""The BNNeck: a BatchNorm1d between the pooled feature and the loss.

Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPR-W 2019.
"""

from torch import nn


def bnneck(num_features: int) -> nn.BatchNorm1d:
    """BatchNorm1d with weight 1 (trained) and bias 0 (frozen), eps 1e-5, momentum 0.1.

    The bias stays 0 so that features keep lying around the origin, where the cosine similarity of the losses and of
    the evaluation looks from; it is a parameter all the same, so checkpoints of other code bases fit.
    """
    neck = nn.BatchNorm1d(num_features)
    neck.bias.requires_grad_(False)
    return neck
