# SPDX-License-Identifier: Apache-2.0
"""Rendered pedestrians: a re-identification data set without a download, for trying and testing, not a benchmark."""

from fastreid_u.data.synthetic.config import SyntheticConfig
from fastreid_u.data.synthetic.write import generate

__all__ = ["SyntheticConfig", "generate"]
