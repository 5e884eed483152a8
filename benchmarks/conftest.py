# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's JSON says about the machine and the code that ran."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastreid_u import _env


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Threads, GPU, and versions of what a figure depends on; pytest-benchmark itself names the processor."""
    machine_info["cpu_threads"] = {"usable": len(os.sched_getaffinity(0)), "torch": torch.get_num_threads()}
    for capability in _env.capabilities():
        machine_info[capability.name] = capability.detail if capability.present else None


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """pytest-benchmark knows the commit; an installed copy may not be it, so say where the code came from."""
    import fastreid_u

    source = Path(fastreid_u.__file__).parent
    commit_info["package"] = "source tree" if source.parent == config.rootpath else "installed"
