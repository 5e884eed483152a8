# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: data, peak memory, the measured ceilings; and what their JSON says of the machine."""

import ctypes
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trained_features as stored_features
from torch import Tensor

from fastreid_u import _env

LATENT, CAMERAS = 64, 6


@pytest.hookimpl(optionalhook=True)  # make gpu runs without pytest-benchmark
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Threads, GPU, and versions of what a figure depends on; pytest-benchmark itself names the processor."""
    machine_info["cpu_threads"] = {"usable": len(os.sched_getaffinity(0)), "torch": torch.get_num_threads()}
    for capability in _env.capabilities():
        machine_info[capability.name] = capability.detail if capability.present else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """pytest-benchmark knows the commit; an installed copy may not be it, so say where the code came from."""
    import fastreid_u

    source = Path(fastreid_u.__file__).parent
    commit_info["package"] = "source tree" if source.parent == config.rootpath else "installed"


@pytest.fixture(scope="session")
def reid_features() -> Callable[[int, int, torch.device], Tensor]:
    """``reid_features(n, d, device)``: (n, d) unit rows of identities of about 17 images, with a shift per camera and
    one outlier in ten; made on the device, a block at a time, so that a million rows fit."""

    def make(n: int, d: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        centre, shift, spread = normal(n // 17 + 1, LATENT), 0.35 * normal(CAMERAS, LATENT), normal(LATENT, d) / LATENT
        x = torch.empty(n, d, device=device)
        for rows in x.split(8192):
            identity, camera = (
                torch.randint(most, (len(rows),), generator=generator, device=device) for most in (len(centre), CAMERAS)
            )
            outlier = torch.rand(len(rows), 1, generator=generator, device=device) < 0.1
            latent = torch.where(outlier, 1.2 * normal(len(rows), LATENT), centre[identity] + shift[camera])
            latent += 0.7 * normal(len(rows), LATENT)
            rows.copy_(F.normalize(latent @ spread + 0.2 / d**0.5 * normal(len(rows), d)))
        return x

    return make


@pytest.fixture(scope="session")
def trained_features() -> Callable[[int, int, torch.device], Tensor]:
    """``trained_features(n, d, device)``: (n, d) unit rows that a trained network gives of rendered people, for d = 256
    (to 50,000 rows) and 2048 (to 12,936). Skips where the cache has none; the reason has the command that makes them.
    """

    def read(n: int, d: int, device: torch.device) -> Tensor:
        try:
            return torch.from_numpy(stored_features.load(n, d)).to(device)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    return read


@pytest.fixture(scope="session")
def peak_bytes() -> Callable[[Callable[[], Any], torch.device], tuple[Any, int]]:
    """``peak_bytes(run, device)``: a call's result, and the memory that it takes at its peak beyond what is there."""

    def resident(entry: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0])

    def measure(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            torch.cuda.synchronize()
            return result, torch.cuda.max_memory_allocated() - before
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # what earlier calls freed would hide what this one takes
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        result = run()
        return result, resident("VmHWM") - before

    return measure


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What ``make gpu-ceilings`` measured on this GPU, by name ("fp16 TFLOP/s") in units; empty if it did not."""
    if not torch.cuda.is_available():
        return {}
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia")).strip("-")
    path = Path(__file__).parent / "results" / name / "ceilings.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    found = [case["figures"] for case in cases.values() if case["status"] == "ok"]
    return {name: 1e12 * rate for figures in found for name, rate in figures.items()}
