# SPDX-License-Identifier: Apache-2.0
"""A file of kernels/ works alone: copied out, under another name, in a process that cannot import fastreid_u."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[1] / "kernels").glob("*.py"))

LOAD = """
import importlib.util, sys
sys.modules["fastreid_u"] = None
spec = importlib.util.spec_from_file_location("somebody_elses_kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
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
}


def alone(path: Path, code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run ``code`` on a copy of ``path`` in ``folder``, interpreted."""
    copy = Path(shutil.copy(path, folder / "copied_out.py"))
    return subprocess.run(
        [sys.executable, "-c", LOAD + code, str(copy)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_stands_alone(path, tmp_path):
    done = alone(path, RUN.get(path.stem, ""), tmp_path)
    assert done.returncode == 0, done.stderr


def test_one_that_leans_on_the_package_would_be_seen(tmp_path):
    path = tmp_path / "leaning.py"
    path.write_text("from fastreid_u._checks import require_2d\n")
    done = alone(path, "", tmp_path)
    assert done.returncode != 0
    assert "fastreid_u" in done.stderr
