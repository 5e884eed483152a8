# SPDX-License-Identifier: Apache-2.0
"""A file or folder of kernels/ works alone: copied out, under another name, where fastreid_u cannot be imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
KERNELS = sorted([*FOLDER.glob("*.py"), *(path.parent for path in FOLDER.glob("*/__init__.py"))])

LOAD = """
import sys
sys.modules["fastreid_u"] = None
import copied_out as module
import torch
"""

RUN = {
    "momentum_update": """
memory = torch.eye(3)[:1].clone()
x = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8]])
module.momentum_update_(memory, x, torch.tensor([0, 0]), momentum=0.1)
torch.testing.assert_close(memory[0], torch.tensor([0.653552, 0.057648, 0.754683]), atol=1e-6, rtol=0)
""",
    "cluster_nce": """
x, memory = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6)
targets = torch.tensor([0, 3, 1, 1, 2])
expected = torch.nn.functional.cross_entropy(torch.nn.functional.normalize(x) @ memory.T / 0.05, targets)
found = module.cluster_nce(x, targets, memory)
torch.testing.assert_close(found, expected)
torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), atol=1e-5, rtol=1e-5)
""",
    "proxy_nce": """
x, memory = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6)
clusters, cameras, own = torch.tensor([0, 3, 1, 1, 2]), torch.zeros(5, dtype=torch.int64), torch.arange(4)
expected = torch.nn.functional.cross_entropy(torch.nn.functional.normalize(x) @ memory.T / 0.07, clusters)
found = module.proxy_nce(x, clusters, cameras, memory, own, torch.zeros_like(own), hard_negatives=None)
torch.testing.assert_close(found, expected)
torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), atol=1e-5, rtol=1e-5)
""",
}


def alone(path: Path, code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run ``code`` on a copy of ``path`` in ``folder``, interpreted."""
    if path.is_dir():
        shutil.copytree(path, folder / "copied_out")
    else:
        shutil.copy(path, folder / "copied_out.py")
    return subprocess.run(
        [sys.executable, "-c", LOAD + code],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_stands_alone(path, tmp_path):
    done = alone(path, RUN.get(path.stem, ""), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["leaning.py", "leaning/__init__.py"])
def test_one_that_leans_on_the_package_would_be_seen(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("from fastreid_u._checks import require_2d\n")
    path = path.parent if path.name == "__init__.py" else path
    done = alone(path, "", tmp_path)
    assert done.returncode != 0
    assert "fastreid_u" in done.stderr
