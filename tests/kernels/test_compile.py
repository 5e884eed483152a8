# SPDX-License-Identifier: Apache-2.0
"""The step's Triton kernels compile for three generations of GPU, without one, and keep their tiles in registers.

The launchers run on meta tensors of real sizes with recorders in place of the kernels; what they would have launched is
compiled in a fresh process, because the interpreter of the other tests is chosen when a kernel is defined.
"""

import json
import os
import subprocess
import sys

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


def compiled(capability: int, **tiles) -> list[dict]:
    """Every kernel of the tests, compiled for ``sm_<capability>``: one row of numbers each."""
    result = subprocess.run(
        [sys.executable, __file__, str(capability), json.dumps(tiles)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_and_does_not_spill(capability, record_property):
    pytest.importorskip("triton", reason="there is no triton for this platform")
    rows = compiled(capability)
    record_property("kernels", rows)
    print(*rows, sep="\n")
    assert {row["kernel"] for row in rows} == STEP
    # Triton 3.6 (its own ptxas) sets two 64-bit scalars aside in some; a tile that spills takes hundreds of bytes
    assert [row for row in rows if row["stack_bytes"] > 16] == []
    assert [row for row in rows if row["shared_bytes"] > 163 * 1024] == []  # what sm_80 has, the least of the three


def test_a_spill_would_be_seen():
    pytest.importorskip("triton", reason="there is no triton for this platform")
    rows = compiled(80, FORWARD_TILE={"4": [128, 128, 32, 4]})
    assert any(row["stack_bytes"] > 100 for row in rows)


def recorded_launches(tiles: dict) -> list[tuple]:
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


def as_source(kernel, args: tuple, kwargs: dict):
    """What Triton's launcher makes of the arguments: types, ones as constants, multiples of 16 marked."""
    from triton.compiler import ASTSource

    signature, constants, marked = {}, {}, {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for at, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (value == 1 if isinstance(value, int) else False):
            signature[parameter.name], constants[(at,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            tensor = not isinstance(value, int)
            signature[parameter.name] = "*" + NAMES[str(value.dtype).removeprefix("torch.")] if tensor else "i32"
            if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                marked[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=marked)


def main(capability: int, tiles: dict) -> None:
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget

    rows = []
    for kernel, args, kwargs in recorded_launches(tiles):
        options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        binary = triton.compile(as_source(kernel, args, kwargs), GPUTarget("cuda", capability, 32), options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        rows.append(
            {
                "kernel": kernel.fn.__name__,
                "dtype": str(args[1].dtype),  # of the features or the memory
                "registers": int(registers),
                "stack_bytes": int(stack),
                "shared_bytes": binary.metadata.shared,
                "warps": binary.metadata.num_warps,
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
