# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for three generations of GPU, without one, and keeps its tiles in registers.

They compile in a fresh process, because the interpreter of the other tests is chosen when a kernel is defined. There
the launchers of a training step run on meta tensors of real sizes with recorders in place of the kernels. Those of the
label step read sizes back, so their launches stand in a table: at k1 = 30, k2 = 6 and D = 2048, and at the smallest
input, whose sizes of 1 the launcher makes constants.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "bool": "i1"}
STEP = {
    "_cluster_nce_logits_kernel",
    "_cluster_nce_loss_kernel",
    "_cluster_nce_grad_x_kernel",
    "_cluster_nce_finish_kernel",
    "_cluster_nce_grad_memory_kernel",
    "_momentum_update_kernel",
    "_proxy_nce_logits_kernel",
    "_proxy_nce_select_kernel",
    "_proxy_nce_gather_kernel",
    "_proxy_nce_grad_x_kernel",
    "_proxy_nce_finish_kernel",
    "_nearest_other_kernel",
    "_row_update_kernel",
}
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
RANKS = {"query_ptr": "*i32", "start_ptr": "*i64", "twice_beta": "fp32", "zeta": "fp32"} | dict.fromkeys(
    ("size_ptr", "other_size_ptr", "other_reach_ptr", "mark_ptr"), "*fp32"
)
EXACT = {"mark_ptr": "*fp64", "mark_column_ptr": "*i64"}
# file, kernel, warps, constants, types that differ from TYPES
LABELS = [
    ("knn.plain", "_filter_kernel", 4, {"CAP": 512, "BLOCK_R": 8, "BLOCK_C": 512}, {}),
    ("knn.plain", "_tighten_kernel", 4, {"CAP": 512, "BLOCK_E": 32}, {}),
    ("knn.measure", "_measure_kernel", 4, DISTANCE | {"ALL": False}, {}),
    ("knn.measure", "_measure_kernel", 4, DISTANCE | {"ALL": True, "index_ptr": None, "count_ptr": None}, {}),
    ("knn.measure", "_order_kernel", 4, {"CAP": 512, "BLOCK_E": 32, "ALONE": True}, {}),
    ("knn.measure", "_order_kernel", 4, {"CAP": 1024, "BLOCK_E": 16, "ALONE": True}, {}),
    ("knn.measure", "_order_kernel", 4, {"CAP": 4096, "BLOCK_E": 4, "ALONE": True}, {}),
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
    ("knn.plain", "_tighten_kernel", 4, {"CAP": 64, "BLOCK_E": 32, "K": 1}, {}),
    ("knn.measure", "_measure_kernel", 4, {"BLOCK_E": 8, "BLOCK_D": 1, "ALL": False, "D": 1}, {}),
    ("knn.measure", "_order_kernel", 4, {"CAP": 64, "BLOCK_E": 32, "ALONE": False, "K": 1}, {}),
    ("jaccard", "_meet_kernel", 2, LISTS, {}),
    ("jaccard", "_meet_kernel", 2, LISTS, {"first_entry": "i64", "last_entry": "i64", "first_slot": "i64"}),
    ("jaccard", "_pass_kernel", 4, PASS | NOWHERE, {}),
    ("jaccard", "_pass_kernel", 4, PASS | {"FILL": True, "count_ptr": None}, {}),
    ("jaccard", "_overlap_kernel", 2, LISTS, {}),
    ("knn.cascade", "_append_kernel", 1, {"CAP": 1024, "BLOCK_W": 128}, {}),
    ("rank_metrics", "_rank_count_kernel", 4, {"BLOCK_C": 2048}, RANKS),
    ("rank_metrics", "_rank_measure_kernel", 4, DISTANCE, RANKS | {"dist_ptr": "*fp64"}),
    ("rank_metrics", "_rank_measure_kernel", 4, DISTANCE | {"BLOCK_D": 1}, RANKS | {"dist_ptr": "*fp64"}),
    ("rank_metrics", "_rank_settle_kernel", 4, {"BLOCK_E": 128}, RANKS | EXACT | {"dist_ptr": "*fp64"}),
    ("rank_metrics", "_rank_matrix_kernel", 4, {"BLOCK_C": 1024}, RANKS | EXACT | {"distmat_ptr": "*fp32"}),
    ("rank_metrics", "_rank_matrix_kernel", 4, {"BLOCK_C": 1024}, RANKS | EXACT | {"distmat_ptr": "*fp64"}),
]  # fmt: skip
SHORT = {"query_ptr": "*fp16", "gallery_ptr": "*fp16", "best_ptr": "*fp32"}
GUESS = {"COLUMNS": 64, "BLOCK_R": 128, "BLOCK_C": 64, "num_stages": 3}
# width of the rows, columns of a tile, stages of the pipeline; 64 columns where shared memory is small
MARKS = ((64, 128, 3), (128, 128, 3), (256, 128, 2), (64, 64, 3), (128, 64, 3), (256, 64, 2))
PRODUCTS = [
    *(("knn.cascade", "_guess_kernel", 8, GUESS | {"WIDTH": width}, SHORT) for width in (64, 256)),
    *(
        ("knn.cascade", "_mark_kernel", 8, {"WIDTH": r, "BLOCK_R": 128, "BLOCK_C": c, "num_stages": stages}, SHORT)
        for r, c, stages in MARKS
    ),
]
SHARED = {  # what there is, by generation; of it a third, as several programs share a processor
    "step": dict.fromkeys((80, 90, 100), 163 * 1024),
    "labels": dict.fromkeys((80, 90, 100), 48 * 1024),
    "products": {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024},
}
TENSOR_CORES = {80: ["mma.sync"], 90: ["wgmma.mma_async"], 100: ["tcgen05.mma"]}
KERNELS = {"step": STEP, "labels": {name for _, name, *_ in LABELS}, "products": {name for _, name, *_ in PRODUCTS}}
SPILLS = {
    "step": {"tiles": {"FORWARD_TILE": {4: [128, 128, 32, 4]}}},
    "labels": {"only": "_meet_kernel", "maxnreg": 32},
}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton for this platform"
)


def compiled(capability: int, group: str, only: str = "", tiles: dict | None = None, **options) -> list[dict]:
    """One row of numbers for each launch of "step", "labels" or "products" on ``sm_<capability>``.

    Args:
        only: the first launch of this kernel, and no other.
        tiles: of the step's forward, in place of its own; then the first launch only.
        options: of Triton's compiler.
    """
    result = subprocess.run(
        [sys.executable, __file__, json.dumps([capability, group, only, tiles or {}, options])],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_triton
@pytest.mark.parametrize("group", KERNELS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_and_does_not_spill(capability, group, record_property):
    rows = compiled(capability, group)
    record_property("kernels", rows)
    print(*rows, sep="\n")
    assert {row["kernel"] for row in rows} == KERNELS[group]
    # Triton 3.6 (its own ptxas) sets two 64-bit scalars aside in some; a tile that spills takes hundreds of bytes
    assert [row for row in rows if row["stack_bytes"] > 16] == []
    assert [row for row in rows if row["shared_bytes"] > SHARED[group][capability]] == []
    products = [row for row in rows if row["kernel"] in KERNELS["products"]]
    assert [row for row in products if row["tensor_cores"] != TENSOR_CORES[capability]] == []
    # the narrow tile is for chips that compile as 8.0 does and have less
    narrow = [row["shared_bytes"] for row in products if capability == 80 and row["constants"]["BLOCK_C"] == 64]
    assert max(narrow, default=0) <= 99 * 1024


@needs_triton
@pytest.mark.parametrize("group", ["step", "labels"])
def test_a_spill_would_be_seen(group):
    assert any(row["stack_bytes"] > 100 for row in compiled(80, group, **SPILLS[group]))


@needs_triton
def test_no_kernel_is_forgotten():
    import fastreid_u.kernels

    files = [path for root in fastreid_u.kernels.__path__ for path in Path(root).rglob("*.py")]
    defined = {name for path in files for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert set().union(*KERNELS.values()) == defined


@needs_triton
def test_thresholds_do_not_depend_on_what_the_compiler_fuses(monkeypatch):
    """A lower bound that the kernel makes twice must be the same number: a fused product is rounded another way."""
    import torch

    from fastreid_u.kernels.knn import knn, plain

    assert "fma.rn.f32" in compiled(90, "labels", "_tighten_kernel")[0]["rounded_otherwise"]
    assert compiled(90, "labels", "_tighten_kernel", enable_fp_fusion=False)[0]["rounded_otherwise"] == []
    launches, run = [], plain._tighten_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (launches.append(kwargs), run[grid](*args, **kwargs))

    monkeypatch.setattr(plain, "_tighten_kernel", Recorder())
    knn(torch.eye(3, device="cuda" if torch.cuda.is_available() else "cpu"), 2)
    assert [launch["enable_fp_fusion"] for launch in launches] == [False]


@needs_triton
def test_published_weights_are_not_approximations():
    """Triton's float32 exponential and division are: ex2.approx and div.full, off by some units in the last place."""
    assert compiled(90, "labels", "_weigh_float32_kernel")[0]["rounded_otherwise"] == []


# in the fresh process


def recorded_launches(tiles: dict) -> list[tuple]:
    """(kernel, args, kwargs) of every different launch of a training step."""
    import torch

    from fastreid_u.kernels import cluster_nce, momentum_update, proxy_nce

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))

    files = cluster_nce.logits, cluster_nce.loss, cluster_nce.backward, proxy_nce.forward, proxy_nce.backward
    for module in (*files, momentum_update):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name)))

    def loss(b, c, d, dtype, **settings):
        x = torch.zeros(b, d, dtype=dtype, device="meta", requires_grad=True)
        memory = torch.zeros(c, d, dtype=dtype, device="meta", requires_grad=settings.pop("trained", False))
        targets = torch.zeros(b, dtype=torch.int64, device="meta")
        cluster_nce.cluster_nce(x, targets, memory, **settings).backward()

    if tiles:
        cluster_nce.logits.FORWARD_TILE = {int(size): tile for size, tile in tiles["FORWARD_TILE"].items()}
        loss(256, 700, 2048, torch.float32)
        return launches[:1]
    status = torch.zeros(1, dtype=torch.int32, device="meta")
    loss(256, 700, 2048, torch.float32, trained=True, status=status)
    loss(256, 700, 2048, torch.float16)
    del launches[-2]  # the small kernel between the two big ones does not depend on the dtype
    loss(64, 20_000, 384, torch.float32, weight=torch.zeros(64, device="meta"))
    del launches[-4:-2]  # the backward splits the classes and finishes in a kernel of its own
    for dtype in (torch.float32, torch.float16):
        b, c, d = 256, 700, 2048
        every_option = {
            "teacher": torch.zeros(b, d, dtype=dtype, device="meta"), "teacher_weight": torch.zeros(b, device="meta"),
            "smoothing": torch.zeros(b, device="meta"), "extra_target": torch.zeros(b, c, device="meta"),
            "extra_weight": torch.zeros(b, device="meta"),
            "class_mask": torch.zeros(c, dtype=torch.bool, device="meta"),
        }  # fmt: skip
        loss(b, c, d, dtype, trained=True, focal=2.0, weight=torch.zeros(b, device="meta"), **every_option)
    del launches[-3]  # the small kernel again
    mask = {"class_mask": torch.zeros(20_000, dtype=torch.bool, device="meta")}
    loss(64, 20_000, 2048, torch.float32, trained=True, focal=4.0, epsilon=1e-6, **mask)
    whole = torch.zeros(700, dtype=torch.int64, device="meta")
    clusters = {"labels": whole, "cluster_sizes": whole, "cluster_means": torch.zeros(700, 2048, device="meta")}
    rules = {
        "sequential": {},
        "hard": {},
        "mean": {},
        "weighted": {"weight_temperature": 0.1},
        "index": {"index": whole},
    }
    for rule, settings in (rules | {"push": {}, "row": clusters}).items():
        memory, x = torch.zeros(700, 2048, device="meta"), torch.zeros(256, 2048, device="meta")
        flags = {"found_inf": torch.zeros(1, device="meta"), "status": status}
        momentum_update.momentum_update_(memory, x, whole[:256], rule=rule, **settings, **flags)
    momentum_update.momentum_update_(memory[:0], x, whole[:256], rule="push", **flags)  # no row, and none to look for

    def proxy_loss(b, q, d, dtype, **settings):
        x = torch.zeros(b, d, dtype=dtype, device="meta", requires_grad=True)
        of_sample, of_proxy = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (b, q))
        memory = torch.zeros(q, d, dtype=dtype, device="meta")
        proxy_nce.proxy_nce(
            x, of_sample, of_sample, memory, of_proxy, of_proxy, reduction="camera", status=status, **settings
        ).backward()

    # Logits, selection and backward, twice; the selection does not depend on the dtype, the logits not on the scope.
    for dtype, kept in ((torch.float32, (0, 1, 2, 4, 5)), (torch.float16, (0, 2, 5))):
        first = len(launches)
        proxy_loss(256, 3300, 2048, dtype, compat=True, positives="other_cameras")
        proxy_loss(256, 3300, 2048, dtype, scope="camera")
        launches[first:] = [launches[first + i] for i in kept]
    proxy_loss(64, 20_000, 384, torch.float32, scope="camera")
    del launches[-4:-2]  # the backward splits the proxies and finishes in a kernel of its own
    return launches


def of_the_step(tiles: dict):
    """(kernel, types, constants, multiples of 16, options) of each launch, as Triton's launcher sees the arguments."""
    for kernel, args, kwargs in recorded_launches(tiles):
        types, constants, sixteens = {}, {}, []
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for parameter in kernel.params:
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or (value == 1 if isinstance(value, int) else False):
                constants[name] = value
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                tensor = not isinstance(value, int)
                types[name] = "*" + NAMES[str(value.dtype).removeprefix("torch.")] if tensor else "i32"
                if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                    sixteens.append(name)
        yield kernel, types, constants, sixteens, {o: kwargs[o] for o in ("num_warps", "num_stages") if o in kwargs}


def of_a_table(table: list[tuple]):
    """The same for the rows of LABELS or PRODUCTS."""
    for file, name, warps, constants, others in table:
        constants = dict(constants)
        options = {"num_warps": warps} | {o: constants.pop(o) for o in ("num_stages",) if o in constants}
        kernel = getattr(importlib.import_module(f"fastreid_u.kernels.{file}"), name)
        types = {
            argument: (TYPES | others).get(argument) or ("*i32" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names if argument not in constants
        }  # fmt: skip
        plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        sixteens = [a for a, kind in types.items() if kind[0] == "*" or (a == "D" and a not in plain)]
        yield kernel, types, constants, sixteens, options


def row_of(kernel, types: dict, constants: dict, sixteens: list, options: dict, capability: int) -> dict:
    """Compiles one launch: what it takes, and how its float32 numbers are rounded."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    at = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in at},
        constexprs={(at[name],): value for name, value in constants.items()},
        attrs={(at[name],): [["tt.divisibility", 16]] for name in sixteens},
    )
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": kernel.fn.__name__,
        "type": types.get(kernel.arg_names[1]),  # in a training step, of the features or the memory
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "constants": {name: value for name, value in constants.items() if name.isupper()},
        "tensor_cores": sorted(set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", binary.asm["ptx"]))),
        "rounded_otherwise": sorted(set(re.findall(r"fma\.\S*f32|div\.full\S*|\S+\.approx\S*", binary.asm["ptx"]))),
    }


def main(capability: int, group: str, only: str, tiles: dict, options: dict) -> None:
    launches = of_the_step(tiles) if group == "step" else of_a_table({"labels": LABELS, "products": PRODUCTS}[group])
    if only:
        launches = [next(launch for launch in launches if launch[0].fn.__name__ == only)]
    print(json.dumps([row_of(*launch[:-1], launch[-1] | options, capability) for launch in launches]))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
