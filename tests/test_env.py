# SPDX-License-Identifier: Apache-2.0
"""The capability table tells the truth, and says why something is absent."""

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastreid_u import _env, _ext


@pytest.fixture
def fresh() -> Iterator[None]:
    """Probes forget what they saw, before the test and after it."""
    probes = [value for value in vars(_env).values() if hasattr(value, "cache_clear")] + [_ext.core]
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def test_every_row_says_something() -> None:
    rows = _env.capabilities()
    assert len({row.name for row in rows}) == len(rows) == 13
    assert all(row.detail for row in rows)
    assert {row.name for row in rows if row.present} >= {"python", "torch", "numba", "torchvision", "_C"}


def test_gpu_row_agrees_with_torch() -> None:
    assert _env.gpu().present == torch.cuda.is_available()


@pytest.mark.parametrize("name", ["faiss", "timm", "triton"])
def test_package_row_agrees_with_import(name: str) -> None:
    row = getattr(_env, name)()
    if row.present:
        module = importlib.import_module(name)
        assert module.__version__ in row.detail
    else:
        with pytest.raises(ImportError):
            importlib.import_module(name)


@pytest.mark.usefixtures("fresh")
def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    row = _env.timm()
    assert not row.present
    assert "pip install 'fastreid-u[timm]'" in row.detail


@pytest.mark.usefixtures("fresh")
def test_missing_core_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastreid_u._C", None)
    assert not _env.core().present
    assert "pip install -e ." in _env.core().detail
    assert _env.core_cuda().detail == "_C is missing"
    with pytest.raises(ImportError, match="start Python outside the source checkout"):
        _ext.core()


@pytest.mark.usefixtures("fresh")
def test_broken_nvcc_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", sys.executable + "-that-is-not-there")
    row = _env.nvcc()
    assert not row.present
    assert "does not run" in row.detail


def test_probes_are_asked_once() -> None:
    assert _env.gpu() is _env.gpu()
    assert _env.nvcc() is _env.nvcc()


def test_python_m_prints_the_table(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastreid_u"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    for row in _env.capabilities():
        assert any(row.name in line and row.detail in line for line in done.stdout.splitlines()), row
    assert done.stderr == ""
