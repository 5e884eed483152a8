# SPDX-License-Identifier: Apache-2.0
"""Rendered pedestrians: a re-identification data set without a download, for trying and testing, not a benchmark."""

from .config import SyntheticConfig
from .write import generate

__all__ = ["SyntheticConfig", "generate"]
