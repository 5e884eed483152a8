# SPDX-License-Identifier: Apache-2.0
"""What this machine offers: one cached probe each, saying what is there or why it is not.

Nothing runs at import. A probe never raises, and looks without importing wherever a look will do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from fastreid_u import _ext


@dataclass(frozen=True)
class Capability:
    """One row of the capability table.

    Attributes:
        name: what was looked for.
        present: whether it can be used here.
        detail: version or names if present; else why not, and what would change that.
    """

    name: str
    present: bool
    detail: str


@functools.cache
def python() -> Capability:
    """The interpreter."""
    return Capability("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


@functools.cache
def torch_build() -> Capability:
    """torch, and the CUDA version it was built for."""
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Capability("torch", True, f"{torch.__version__}, {cuda}")


@functools.cache
def gpu() -> Capability:
    """CUDA devices that torch can use."""
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Capability("gpu", True, ", ".join(names))
    if torch.version.cuda is None:
        return Capability("gpu", False, "this torch is built without CUDA; everything runs on the CPU")
    return Capability("gpu", False, "torch finds no CUDA device or driver; everything runs on the CPU")


@functools.cache
def core() -> Capability:
    """The compiled module ``_C``."""
    try:
        _ext.core()
    except ImportError as error:
        return Capability("_C", False, str(error))
    return Capability("_C", True, "DBSCAN on CPU threads")


@functools.cache
def core_cuda() -> Capability:
    """The CUDA half of ``_C``, and a device to run it on."""
    name = "_C cuda"
    if not core().present:
        return Capability(name, False, "_C is missing")
    if not _ext.core().built_with_cuda:
        return Capability(
            name,
            False,
            "_C was built without nvcc: install [cupy], or reinstall with nvcc on PATH and FASTREID_U_CUDA=ON",
        )
    if not gpu().present:
        return Capability(name, False, f"built, but {gpu().detail}")
    return Capability(name, True, "DBSCAN on the GPU")


@functools.cache
def triton() -> Capability:
    """Triton, which torch brings along on Linux."""
    return _package("triton", "triton", "comes with torch on Linux; there is none for this platform")


@functools.cache
def numba() -> Capability:
    """numba, for the sparse ops on a CPU."""
    return _package("numba", "numba", "pip install numba")


@functools.cache
def torchvision() -> Capability:
    """torchvision, for backbones and transforms."""
    return _package("torchvision", "torchvision", "pip install torchvision")


@functools.cache
def cupy() -> Capability:
    """CuPy, which can compile the DBSCAN core where no nvcc was."""
    return _package("cupy", "cupy", "optional: pip install 'fastreid-u[cupy]'")


@functools.cache
def faiss() -> Capability:
    """faiss, for neighbour search beyond brute force."""
    return _package("faiss", "faiss", "optional: pip install 'fastreid-u[faiss]'")


@functools.cache
def infomap() -> Capability:
    """Infomap, another way to labels. Only looked for: its licence is the GPL."""
    return _package("infomap", "infomap", "optional, under the GPL: pip install 'fastreid-u[infomap]'")


@functools.cache
def timm() -> Capability:
    """timm, for backbones beyond ResNet."""
    return _package("timm", "timm", "optional: pip install 'fastreid-u[timm]'")


@functools.cache
def nvcc() -> Capability:
    """The CUDA compiler, needed only to build ``_C`` with CUDA."""
    command = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not command:
        return Capability("nvcc", False, "not on PATH and CUDACXX is not set; needed only to build _C with CUDA")
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Capability("nvcc", False, f"{command} does not run: {error}")
    release = re.search(r"release ([\d.]+)", answer)
    return Capability("nvcc", True, release[1] if release else "unknown version")


def capabilities() -> tuple[Capability, ...]:
    """Every probe, in the order of the table that ``python -m fastreid_u`` prints."""
    probes = (python, torch_build, gpu, core, core_cuda, nvcc, triton, numba, torchvision, cupy, faiss, infomap, timm)
    return tuple(probe() for probe in probes)


def newer_than_tested() -> tuple[str, ...]:
    """Packages that fastreid_u needs or can use, installed in a newer version than the suite was last run with.

    Returns:
        ("numpy 2.5.0 (tested 2.4.6)", ...) by name; empty if none is newer.
    """
    tested = _tested_versions()
    found = []
    for name in sorted(tested.keys() & {"triton", *_declared()}):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _release(installed) > _release(tested[name]):
            found.append(f"{name} {installed} (tested {tested[name]})")
    return tuple(found)


def _tested_versions() -> dict[str, str]:
    """``constraints.txt``: beside this file where fastreid_u is installed, above it in a source checkout."""
    here = Path(__file__).parent
    for path in (here / "constraints.txt", here.parent / "constraints.txt"):
        if path.is_file():
            pins = [line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]
            return {_normal(name): version for name, version in pins}
    return {}


def _declared() -> set[str]:
    """Names of the packages that fastreid_u's metadata asks for, extras included; none where it is not installed."""
    try:
        lines = importlib.metadata.requires("fastreid-u") or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {_normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def _normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version before any letter or sign: (2, 14, 1) of "2.14.1+cu130"."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number)


def _package(name: str, module: str, missing: str) -> Capability:
    """Present if the import system finds it; the version comes from whichever distribution installed it."""
    if importlib.util.find_spec(module) is None:
        return Capability(name, False, missing)
    owners = importlib.metadata.packages_distributions().get(module, ())
    return Capability(
        name, True, ", ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in sorted(set(owners)))
    )
