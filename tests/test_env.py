# SPDX-License-Identifier: Apache-2.0
"""The capability table tells the truth, and says why something is absent."""

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fastreid_u
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
@pytest.mark.filterwarnings("error", "ignore:suggest_eps. the knee:UserWarning")
def test_an_unbuilt_core_is_one_error_and_no_slow_reference_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastreid_u._C", None)
    distances, features = 1 - torch.eye(4), torch.eye(4)
    for call in (
        lambda: fastreid_u.dbscan(distances, 0.5),
        lambda: fastreid_u.DBSCAN(0.5).fit(distances),
        lambda: fastreid_u.pseudo_labels(features, k1=2, k2=1),
        lambda: fastreid_u.suggest_eps(features, k1=2, k2=1),
    ):
        with pytest.raises(ImportError, match=r"_C cannot be imported .* run `pip install -e .` once"):
            call()


@pytest.mark.usefixtures("fresh")
def test_broken_nvcc_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", sys.executable + "-that-is-not-there")
    row = _env.nvcc()
    assert not row.present
    assert "does not run" in row.detail


def test_what_is_newer_than_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = {"numpy": "2.4.6", "torch": "2.14.1", "triton": "3.8.0", "click": "8.0.0", "timm": "1.0.9"}
    monkeypatch.setattr(_env, "_tested_versions", lambda: tested)
    installed = {"numpy": "2.10.0", "torch": "2.14.1+cu130", "triton": "3.7.9", "click": "9", "timm": "1.0.10rc1"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed[name])
    assert _env.newer_than_tested() == ("numpy 2.10.0 (tested 2.4.6)", "timm 1.0.10rc1 (tested 1.0.9)")
    monkeypatch.setattr(_env, "_tested_versions", dict)
    assert _env.newer_than_tested() == ()


def test_a_newer_version_shows_in_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from fastreid_u.cli import main

    for newer, shown in (((), False), (("numpy 3.0 (tested 2.4.6)",), True)):
        monkeypatch.setattr(_env, "newer_than_tested", lambda newer=newer: newer)
        assert main([]) == 0
        assert ("newer than tested: numpy 3.0 (tested 2.4.6)" in capsys.readouterr().out) is shown


def test_the_tested_versions_are_known_to_the_installed_package() -> None:
    tested = _env._tested_versions()
    assert {"torch", "triton", "numpy", "numba", "scikit-learn"} <= tested.keys()


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
