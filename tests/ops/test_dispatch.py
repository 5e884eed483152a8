# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: the fastest that can run, or the one that is named, or the reason why not."""

import logging
import warnings

import pytest
import torch

from fastreid_u import _env
from fastreid_u.ops import _dispatch as dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reference():
    return "reference"


def numba():
    return "numba"


def triton():
    return "triton"


@pytest.mark.filterwarnings("ignore:op. .*running the slow reference:RuntimeWarning")
def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    runs = {"reference": reference, "numba": numba, "triton": triton}
    assert dispatch.choose("op", CPU, "auto", **runs) is numba
    assert dispatch.choose("op", CUDA, "auto", **runs) is triton
    assert dispatch.choose("op", CPU, "auto", **runs, cannot={"numba": "numba has no float16"}) is reference
    monkeypatch.setattr(_env, "numba", lambda: _env.Capability("numba", False, "pip install numba"))
    assert dispatch.choose("op", CPU, "auto", **runs) is reference


def test_named_backend_runs_there_or_says_why(monkeypatch):
    runs = {"reference": reference, "numba": numba, "triton": triton}
    assert dispatch.choose("op", CPU, "reference", **runs) is reference
    with pytest.raises(RuntimeError, match="op: backend must be able to run here, got 'numba': numba has no float16"):
        dispatch.choose("op", CPU, "numba", **runs, cannot={"numba": "numba has no float16"})
    monkeypatch.setattr(_env, "numba", lambda: _env.Capability("numba", False, "pip install numba"))
    with pytest.raises(RuntimeError, match="op: backend must be able to run here, got 'numba': pip install numba"):
        dispatch.choose("op", CPU, "numba", **runs, cannot={"numba": "numba has no float16"})
    with pytest.raises(RuntimeError, match="op: backend must run on cpu tensors, got 'triton'"):
        dispatch.choose("op", CPU, "triton", **runs)
    with pytest.raises(
        ValueError, match="op: backend must be one of 'auto', 'reference', 'numba', 'triton', got 'cuda'"
    ):
        dispatch.choose("op", CPU, "cuda", **runs)


def test_every_backend_is_preferred_somewhere_and_needs_known_probes():
    named = {name for names in dispatch.PREFERENCE.values() for name in names}
    assert set(dispatch.NEEDS) == named - {"reference", "segments"}
    assert all(
        isinstance(getattr(_env, probe)(), _env.Capability) for needs in dispatch.NEEDS.values() for probe in needs
    )


def test_what_is_missing_is_named_once_for_all_ops(monkeypatch):
    """A backend of several parts names the first that is missing."""
    monkeypatch.setattr(_env, "gpu", lambda: _env.Capability("gpu", False, "no GPU"))
    monkeypatch.setattr(_env, "cupy", lambda: _env.Capability("cupy", True, "1"))
    assert dispatch.missing("cupy") == "no GPU"
    monkeypatch.setattr(_env, "cupy", lambda: _env.Capability("cupy", False, "no CuPy"))
    assert dispatch.missing("cupy") == "no CuPy"
    assert dispatch.missing("reference") is None


def test_the_choice_of_a_gpu_compiles_whole(monkeypatch):
    """Probes look for packages, which torch.compile cannot trace."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "PREFERENCE", {"cpu": ("triton", "reference")})

    def step(x):
        return x + len(dispatch.choose("op", x.device, "auto", reference=reference, triton=triton)())

    assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [6, 6]


def test_only_the_reference_on_a_gpu_warns_once():
    dispatch._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow_op: no cuda kernel yet"):
        dispatch.choose("slow_op", CUDA, "auto", reference=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose("slow_op", CUDA, "auto", reference=reference)


def test_choice_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="fastreid_u.ops._dispatch"):
        dispatch.choose("op", CPU, "auto", reference=reference)
    assert "op on cpu runs reference" in caplog.text
