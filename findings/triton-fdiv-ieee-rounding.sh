#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# triton 3.6.0 against 3.8.0: fdiv(x, y, ieee_rounding=True) is the approximate division in the older one.
#
# Expected: ieee_rounding=True makes a division that is rounded once, as its documentation has it.
# Seen: compiled for compute capability 9.0, triton 3.6 emits div.full.f32 (2 ulp) with and without the argument; only
# triton.language.math.div_rn emits div.rn.f32. In 3.8 fdiv does too. Nothing on a CPU shows the difference but the
# PTX.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cat > "$temp/divide.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def plain(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) / tl.load(y + i))


@triton.jit
def fdiv(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fdiv(tl.load(x + i), tl.load(y + i), ieee_rounding=True))


@triton.jit
def div_rn(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.math.div_rn(tl.load(x + i), tl.load(y + i)))


for kernel in (plain, fdiv, div_rn):
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "N": "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs={(3,): 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(triton.__version__, kernel.__name__, *sorted(set(re.findall(r"\bdiv\.\w+\.f32", ptx))))
PYTHON
for version in 3.6.0 3.8.0; do
    python3 -m venv "$temp/$version"
    "$temp/$version/bin/pip" install --quiet --disable-pip-version-check triton==$version
    TRITON_CACHE_DIR="$temp/cache" "$temp/$version/bin/python" "$temp/divide.py"
done > "$temp/seen"
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
3.6.0 plain div.full.f32
3.6.0 fdiv div.full.f32
3.6.0 div_rn div.rn.f32
3.8.0 plain div.full.f32
3.8.0 fdiv div.rn.f32
3.8.0 div_rn div.rn.f32
SEEN
