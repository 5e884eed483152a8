# SPDX-License-Identifier: Apache-2.0
"""``import fastreid_u`` is lazy: it costs next to nothing beside torch, and brings in nothing that nobody asked for."""

import os
import subprocess
import sys

import pytest

import fastreid_u

LATER = ["triton", "torchvision", "rich", "sklearn", "scipy", "matplotlib", "numba", "PIL", "safetensors"]


def python(code: str, folder: os.PathLike) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_brings_in_nothing_that_was_not_asked_for(tmp_path) -> None:
    """torch may import what it likes, so it goes first."""
    code = f"""
import sys, torch
before = set(sys.modules)
import fastreid_u
new = set(sys.modules) - before
print(sorted(name for name in {LATER} if name in new), sorted(name for name in new if name.startswith("fastreid_u.")))
"""
    assert python(code, tmp_path) == "[] []"


def test_is_quick(tmp_path) -> None:
    """In processor time as a share of torch's own import: neither a slow machine nor a busy one changes that much."""
    code = """
import time
begin = time.process_time()
import torch
between = time.process_time()
import fastreid_u
print((time.process_time() - between) / (between - begin))
"""
    assert min(float(python(code, tmp_path)) for _ in range(3)) < 0.1


def test_the_ops_need_no_display(tmp_path) -> None:
    """The ops run in a trainer that has none of the packages for people: progress, command line, pictures."""
    code = """
import sys
for name in ("rich", "matplotlib", "PIL", "safetensors", "torchvision"):
    sys.modules[name] = None
import torch, fastreid_u
x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
graph = fastreid_u.jaccard_graph(x, k1=10, k2=3)
print(fastreid_u.dbscan(graph, 0.6, radius=1.0).shape)
"""
    assert python(code, tmp_path) == "torch.Size([40])"


def test_the_command_line_starts_without_torch(tmp_path) -> None:
    """A command imports what it needs once it has been called; ``--help`` and a mistyped command need nothing."""
    code = "import sys, fastreid_u.cli; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    assert python(code, tmp_path) == "[]"


@pytest.mark.parametrize("name", sorted(fastreid_u.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fastreid_u, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastreid_u' has no attribute 'no_such_name'"):
        fastreid_u.no_such_name  # noqa: B018
