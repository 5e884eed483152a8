# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of the compiled core, without a GPU: by NVRTC as CuPy would compile it, and by nvcc; nothing spills.

What a build without nvcc would launch is recorded on a CPU: names of kernels, and bytes of their arguments.
"""

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastreid_u import _env, _ext
from fastreid_u.ops import _compiled

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # Turing, which CUDA 13 starts with, to the newest


class Recorder:
    """Stands where a Launcher would."""

    def __init__(self) -> None:
        self.launched: dict[str, int] = {}
        self.flag = 1  # a graph looks asymmetric once

    def launch(self, kernel: str, blocks: int, threads: int, n: int, functor: bytes) -> None:
        assert blocks >= 1
        assert threads == 256
        self.launched[kernel] = len(functor)

    def read(self, address: int) -> int:
        self.flag -= 1
        return self.flag + 1

    def write(self, address: int, value: int) -> None:
        pass


@functools.cache
def launched() -> dict[str, int]:
    """Kernels, and bytes of their arguments, for an encoding and for a graph of each type."""
    core, found = _ext.core(), {}
    recorder = Recorder()
    nothing = {"indptr": 8, "column": 8, "mass": 8, "neighbours": 8}  # not read: kernels get these, and none runs
    encoding = core.Encoding(**nothing, n=5, nnz=9, k=3, weight=1000)
    core.pseudo_labels_launched(encoding, need=[571], min_samples=99, labels=8, scratch=8, launcher=recorder)
    found |= recorder.launched
    for index_bytes, value_bytes, indptr in ((4, 4, 0), (4, 4, 8), (8, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 0)):
        graph = core.Graph(
            indptr=indptr, indices=8, data=8, n=5, nnz=9, index_bytes=index_bytes, value_bytes=value_bytes
        )
        recorder = Recorder()
        core.check_graph_launched(graph, scratch=8, launcher=recorder)
        recorder.flag = 1
        core.dbscan_launched(graph, eps=[0.5], min_samples=4, labels=8, core=8, scratch=8, launcher=recorder)
        found |= recorder.launched
    return found


def nvrtc() -> ctypes.CDLL:
    """The library that torch's CUDA wheels bring, or one on the loader's path."""
    versions = [f"libnvrtc.so.{major}" for major in (13, 12)]
    sites = Path(torch.__file__).parents[1] / "nvidia"
    for name in [*map(str, sorted(path for v in versions for path in sites.glob(f"*/lib/{v}"))), *versions]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("no libnvrtc: pip install nvidia-cuda-nvrtc")


def compile_by_compiled(architecture: int, kernels: list[str], extra: str = "", *flags: str) -> tuple[bool, str]:
    """Whether the source compiles to machine code, and the compiler's log."""
    library, program = nvrtc(), ctypes.c_void_p()
    code = (_compiled.source() + extra).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, b"core.cu", 0, None, None) == 0
    for kernel in kernels:
        assert library.nvrtcAddNameExpression(program, kernel.encode()) == 0
    own = (f"-arch=sm_{architecture}", "--device-as-default-execution-space", "--ptxas-options=-v")  # as CuPy adds
    given = [option.encode() for option in (*_compiled.options(), *own, *flags)]
    status = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if status == 0:
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        assert size.value > 1000
        for kernel in kernels:
            name = ctypes.c_char_p()
            assert library.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name)) == 0
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status == 0, log.value.decode()


def usage(log: str) -> list[dict[str, int | str]]:
    """One row a kernel, as ptxas tells it."""
    pattern = (
        r"entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    parts = re.split(r"(?=Compiling entry function)", re.sub(r"'(?:void )?([^']*)'", _short, log))[1:]
    rows = []
    for part in parts:
        name, stack, stores, loads, registers, shared = re.search(pattern, part, re.DOTALL).groups()
        rows.append(
            {"kernel": name, "registers": int(registers), "shared_bytes": int(shared or 0)}
            | {"stack_bytes": int(stack), "spilled_bytes": int(stores) + int(loads)}
        )
    return rows


def _short(quoted: re.Match) -> str:
    """A quoted name, mangled or not, as one word."""
    return "'" + re.sub(r"\W+", "_", quoted[1].split("(")[0]) + "'"


def test_every_phase_is_recorded():
    kernels = launched()
    assert len(kernels) > 45
    for phase in ("SettleDoubt", "Bridge", "LabelCrowded"):
        assert kernels[f"fastreid_u::each_crew_kernel<fastreid_u::{phase}>"] < 4096  # what a launch may hold
    assert sum("PassFirstOn" in kernel for kernel in kernels) == 6
    assert any("DenseView<double>" in kernel for kernel in kernels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_by_compiled_and_does_not_spill(architecture, record_property):
    kernels = sorted(kernel for kernel in launched() if "double" not in kernel and "long" not in kernel)
    done, log = compile_by_compiled(architecture, kernels)
    assert done, log
    rows = usage(log)
    record_property("kernels", rows)
    print(*rows, sep="\n")
    assert len(rows) == len(kernels)
    assert [row for row in rows if row["spilled_bytes"] or row["stack_bytes"]] == []
    assert max(row["shared_bytes"] for row in rows) == 40968  # of 48 KB that every GPU has
    assert [row for row in rows if row["registers"] > 64] == []  # so that four blocks share a processor


def test_all_kernels_get_arguments_of_the_size_that_the_device_expects():
    sizes = {re.search(r"kernel<(.*)>$", kernel)[1]: size for kernel, size in launched().items()}
    checks = "".join(f"static_assert(sizeof({functor}) == {size});\n" for functor, size in sizes.items())
    done, log = compile_by_compiled(90, sorted(launched()), checks)
    assert done, log
    wrong = "static_assert(sizeof(fastreid_u::SumSums) == 8);\n"
    done, log = compile_by_compiled(90, [], wrong)
    assert not done, "else this could not fail"
    assert "static assertion failed" in log


def test_a_spill_would_be_seen():
    kernel = "fastreid_u::each_row_kernel<fastreid_u::MeasureNearest>"
    done, log = compile_by_compiled(90, [kernel], "", "--maxrregcount=24")
    assert done, log
    assert usage(log)[0]["spilled_bytes"] > 0


def test_source_names_the_state_of_its_headers():
    """CuPy would take old machine code from its disk cache if only a header had changed."""
    assert re.match(r"// [0-9a-f]{64}\n", _compiled.source())
    headers = {path.name: path.read_text() for path in _compiled.source_folder().iterdir()}
    included = {name for text in headers.values() for name in re.findall(r'#include "(.*)"', text)}
    assert included <= set(headers)


def test_cupy_compiles_it(monkeypatch):
    if not _env.cupy().present:
        pytest.skip(_env.cupy().detail)
    from cupy.cuda import compiler

    nvrtc()  # once loaded it is found by its name
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_compiled", lambda arch=None: ("-arch=sm_90", "cubin"))
    kernel = "fastreid_u::each_crew_kernel<fastreid_u::Bridge>"
    code, names = compiler.compile_using_compiled(
        _compiled.source(), options=_compiled.options(), arch="90", name_expressions=(kernel,)
    )
    assert len(code) > 1000
    assert "Bridge" in names[kernel]


def test_launcher_hands_cupy_the_stream_and_the_bytes(monkeypatch):
    """CuPy passes by value what a NumPy array of one element holds."""
    calls = []
    cupy = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(calls.append(("device", index))),
            ExternalStream=lambda stream, index: contextlib.nullcontext(calls.append(("stream", stream, index))),
        )
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(
        _compiled, "_kernel", lambda name: lambda grid, block, args: calls.append((name, grid, block, args))
    )
    scratch = torch.arange(5)
    launcher = _compiled.Launcher(scratch)
    launcher.launch("k<f>", 12, 256, 3000, b"sixteen of bytes")
    *where, (name, grid, block, (n, functor)) = calls
    assert where == [("device", None), ("stream", 77, None)]  # a CPU tensor has no index
    assert (name, grid, block, n) == ("k<f>", (12,), (256,), 3000)
    assert n.itemsize == 8
    assert (functor.size, functor.tobytes()) == (1, b"sixteen of bytes")

    launcher.write(scratch.data_ptr() + 16, -5)
    assert scratch.tolist() == [0, 1, -5, 3, 4]
    assert launcher.read(scratch.data_ptr() + 16) == -5


@pytest.mark.skipif(not _env.nvcc().present, reason=f"no nvcc: {_env.nvcc().detail}")
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], ARCHITECTURES[-1]])
def test_compiles_by_nvcc_and_does_not_spill(architecture, tmp_path, record_property):
    csrc = Path(__file__).parents[2] / "csrc"
    if not csrc.is_dir():
        pytest.skip("needs a source checkout around it")
    nvcc = os.environ.get("CUDACXX") or "nvcc"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-DFASTREID_U_WITH_CUDA", "-c"]
    done = subprocess.run(
        [*command, csrc / "on_cuda.cu", "-o", tmp_path / "core.o"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    rows = usage(done.stderr)
    record_property("kernels", rows)
    assert len(rows) == len(launched())
    assert [row for row in rows if row["spilled_bytes"] or row["stack_bytes"]] == []
