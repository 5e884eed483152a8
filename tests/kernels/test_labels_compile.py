# SPDX-License-Identifier: Apache-2.0
"""The label kernels compile for three generations of GPU, without one, and keep everything in registers.

They compile in a fresh process, because the interpreter of the other tests is chosen when a kernel is defined. Sizes
are those of k1 = 30, k2 = 6 and D = 2048, and of the smallest input, whose sizes of 1 the launcher makes constants.
"""

import json
import os
import subprocess
import sys

import pytest

# Types of the arguments that are no constants; integers called D are multiples of 16 there, as at D = 2048.
TYPES = {
    "x_ptr": "*fp32", "y_ptr": "*fp32", "dist_ptr": "*fp32", "score_ptr": "*fp32", "reach_ptr": "*fp32",
    "slack_ptr": "*fp32", "lift_ptr": "*fp32", "threshold_ptr": "*fp32", "upper_ptr": "*fp32",
    "out_upper_ptr": "*fp32", "out_dist_ptr": "*fp32", "curve": "fp32", "rounding": "fp32",
    "crow_ptr": "*i64", "begin_ptr": "*i64", "list_begin_ptr": "*i64", "list_end_ptr": "*i64",
    "slot_begin_ptr": "*i64", "table_ptr": "*i64", "query_ptr": "*i64", "out_index_ptr": "*i64",
}  # fmt: skip
DISTANCE = {"BLOCK_E": 8, "BLOCK_D": 256}
SORT = {"BLOCK_T": 64, "BLOCK_E": 32}
LISTS = {"BLOCK": 256, "LANES": 32}
PASS = {"BLOCK": 512, "FILL": False}
NOWHERE = dict.fromkeys(("begin_ptr", "pair_row_ptr", "pair_col_ptr", "overlap_ptr"))
# file, kernel, warps, constants, types that differ from TYPES
KERNELS = [
    ("knn", "_filter_kernel", 4, {"CAP": 512, "BLOCK_R": 8, "BLOCK_C": 512}, {}),
    ("knn", "_tighten_kernel", 4, {"CAP": 512, "BLOCK_E": 32}, {}),
    ("knn", "_measure_kernel", 4, DISTANCE | {"ALL": False}, {}),
    ("knn", "_measure_kernel", 4, DISTANCE | {"ALL": True, "index_ptr": None, "count_ptr": None}, {}),
    ("knn", "_order_kernel", 4, {"CAP": 512, "BLOCK_E": 32, "ALONE": True}, {}),
    ("k_reciprocal", "_mutual_kernel", 1, {"BLOCK_A": 32, "BLOCK_P": 32}, {}),
    ("k_reciprocal", "_expand_kernel", 1, {"BLOCK_Q": 32, "BLOCK_H": 16}, {}),
    ("k_reciprocal", "_merge_kernel", 1, SORT | {"HAS_MASS": False, "mass_ptr": None, "out_mass_ptr": None}, {}),
    ("k_reciprocal", "_merge_kernel", 1, SORT | {"HAS_MASS": True}, {}),
    ("k_reciprocal", "_distance_kernel", 4, DISTANCE | {"COMPAT": False}, {"dist_ptr": "*fp64"}),
    ("k_reciprocal", "_weigh_kernel", 1, {"SCALE": 1 << 28, "BLOCK_W": 128}, {"dist_ptr": "*fp64"}),
    ("k_reciprocal", "_weigh_float32_kernel", 1, {"BLOCK_W": 128}, {"dist_ptr": "*fp64", "weight_ptr": "*fp32"}),
    ("k_reciprocal", "_mutual_kernel", 1, {"BLOCK_A": 32, "BLOCK_P": 32, "K": 1, "H": 1}, {}),
    ("k_reciprocal", "_expand_kernel", 1, {"BLOCK_Q": 1, "BLOCK_H": 1, "K": 1, "H": 1, "W": 1}, {}),
    ("k_reciprocal", "_distance_kernel", 4, DISTANCE | {"BLOCK_D": 1, "COMPAT": True, "D": 1}, {"dist_ptr": "*fp64"}),
    ("k_reciprocal", "_weigh_kernel", 1, {"SCALE": 1 << 28, "BLOCK_W": 1}, {"dist_ptr": "*fp64"}),
    ("knn", "_tighten_kernel", 4, {"CAP": 64, "BLOCK_E": 32, "K": 1}, {}),
    ("knn", "_measure_kernel", 4, {"BLOCK_E": 8, "BLOCK_D": 1, "ALL": False, "D": 1}, {}),
    ("knn", "_order_kernel", 4, {"CAP": 64, "BLOCK_E": 32, "ALONE": False, "K": 1}, {}),
    ("jaccard", "_meet_kernel", 2, LISTS, {}),
    ("jaccard", "_meet_kernel", 2, LISTS, {"first_entry": "i64", "last_entry": "i64", "first_slot": "i64"}),
    ("jaccard", "_pass_kernel", 4, PASS | NOWHERE, {}),
    ("jaccard", "_pass_kernel", 4, PASS | {"FILL": True, "count_ptr": None}, {}),
    ("jaccard", "_overlap_kernel", 2, LISTS, {}),
]  # fmt: skip


def compiled(capability: int, kernels: list, **options) -> list[dict]:
    """One row of numbers for each of ``kernels`` on ``sm_<capability>``; ``options`` of Triton's compiler."""
    result = subprocess.run(
        [sys.executable, __file__, str(capability), json.dumps(kernels), json.dumps(options)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_and_does_not_spill(capability, record_property):
    pytest.importorskip("triton", reason="there is no triton for this platform")
    rows = compiled(capability, KERNELS)
    record_property("kernels", rows)
    print(*rows, sep="\n")
    # Triton 3.6 (its own ptxas) sets two 64-bit scalars aside in some; a tile that spills takes hundreds of bytes
    assert [row for row in rows if row["stack_bytes"] > 16] == []
    assert [row for row in rows if row["shared_bytes"] > 48 * 1024] == []  # so that several programs share a processor


def test_a_spill_would_be_seen():
    pytest.importorskip("triton", reason="there is no triton for this platform")
    kernel = next(kernel for kernel in KERNELS if kernel[1] == "_meet_kernel")
    assert compiled(80, [kernel], maxnreg=32)[0]["stack_bytes"] > 100


def test_no_kernel_is_forgotten():
    pytest.importorskip("triton", reason="there is no triton for this platform")
    from fastreid_u.kernels import jaccard, k_reciprocal, knn

    defined = {name for module in (jaccard, k_reciprocal, knn) for name in vars(module) if name.endswith("_kernel")}
    assert {kernel for _, kernel, *_ in KERNELS} == defined


def test_thresholds_do_not_depend_on_what_the_compiler_fuses(monkeypatch):
    """A lower bound that the kernel makes twice must be the same number: a fused product is rounded another way."""
    pytest.importorskip("triton", reason="there is no triton for this platform")
    import torch

    from fastreid_u.kernels import knn

    kernel = next(kernel for kernel in KERNELS if kernel[1] == "_tighten_kernel")
    assert "fma.rn.f32" in compiled(90, [kernel])[0]["rounded_otherwise"]
    assert compiled(90, [kernel], enable_fp_fusion=False)[0]["rounded_otherwise"] == []
    launches, run = [], knn._tighten_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (launches.append(kwargs), run[grid](*args, **kwargs))

    monkeypatch.setattr(knn, "_tighten_kernel", Recorder())
    knn.knn(torch.eye(3, device="cuda" if torch.cuda.is_available() else "cpu"), 2)
    assert [launch["enable_fp_fusion"] for launch in launches] == [False]


def test_published_weights_are_not_approximations():
    """Triton's float32 exponential and division are: ex2.approx and div.full, off by some units in the last place."""
    pytest.importorskip("triton", reason="there is no triton for this platform")
    kernel = next(kernel for kernel in KERNELS if kernel[1] == "_weigh_float32_kernel")
    assert compiled(90, [kernel])[0]["rounded_otherwise"] == []


def main(capability: int, kernels: list, options: dict) -> None:
    import importlib
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = []
    for file, name, warps, constants, types in kernels:
        kernel = getattr(importlib.import_module(f"fastreid_u.kernels.{file}"), name)
        signature, marked = {}, {}
        for at, argument in enumerate(kernel.arg_names):
            signature[argument] = "constexpr" if argument in constants else {**TYPES, **types}.get(argument)
            signature[argument] = signature[argument] or ("*i32" if argument.endswith("_ptr") else "i32")
            if signature[argument][0] == "*" or (argument == "D" and argument not in constants):
                marked[(at,)] = [["tt.divisibility", 16]]
        constants = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=marked)
        binary = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps} | options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        shared = binary.metadata.shared
        rounded_otherwise = re.findall(r"fma\.\S*f32|div\.full\S*|\S+\.approx\S*", binary.asm["ptx"])
        rows.append(
            {"kernel": name, "registers": int(registers), "stack_bytes": int(stack), "shared_bytes": shared}
            | {"warps": warps}
            | {"rounded_otherwise": sorted(set(rounded_otherwise))}
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
