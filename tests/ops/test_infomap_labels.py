# SPDX-License-Identifier: Apache-2.0
"""Labels by Infomap: which rows are linked, what becomes of its modules, and that it is never imported unasked."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u import _env
from fastreid_u.ops.infomap_labels import clusters, infomap_labels, links
from fastreid_u.ops.knn import knn

needs_infomap = pytest.mark.skipif(not _env.infomap().present, reason=_env.infomap().detail)


def links_by_hand(x, k1, min_similarity):
    """Walk each row's sorted list and stop at the first neighbour that is too far."""
    rows = F.normalize(x.double(), dim=1)
    similarity = rows @ rows.T
    found = []
    for i in range(len(x)):
        order = (1 - similarity[i]).argsort(stable=True)[:k1].tolist()
        for j in order:
            if j == i:
                continue
            if 1 - similarity[i, j] > 1 - min_similarity:
                break
            found.append((i, j, float(similarity[i, j])))
    return found


@pytest.mark.parametrize(("k1", "min_similarity"), [(15, 0.5), (5, 0.7), (40, 0.3), (15, 0.999)])
def test_links(clustered, k1, min_similarity):
    x = 3 * clustered(120, 16, spread=0.9)  # lengths do not matter
    source, target, weight = links(x, k1, min_similarity)
    expected = links_by_hand(x, k1, min_similarity)
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == [(i, j) for i, j, _ in expected]
    np.testing.assert_allclose(weight.numpy(), [s for *_, s in expected], atol=1e-6)
    assert set(target.tolist()) <= set(source.tolist()), "who is linked to links as well"


def test_links_at_the_threshold_count():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    x[1] = torch.tensor([0.5, 3**0.5 / 2])
    near = 1 - knn(F.normalize(x), 2)[0][0, 1].item() / 2
    assert near == pytest.approx(0.5, abs=1e-6)
    assert len(links(x, 3, near)[0]) == 2
    assert len(links(x, 3, np.nextafter(near, 1))[0]) == 0


def test_rows_of_zeros_have_no_link():
    x = torch.zeros(20, 4)
    x[:8, 0] = 1
    source, target, weight = links(x, 20, 0.1)
    assert set(source.tolist()) == set(target.tolist()) == set(range(8))
    assert (weight == 1).all()


def test_small_modules_are_noise_and_the_others_numbered_by_first_row():
    module = torch.tensor([9, 4, 4, 7, 9, 9, 4, 1, 7])
    assert clusters(module, 1).tolist() == [0, 1, 1, 2, 0, 0, 1, 3, 2]
    assert clusters(module, 2).tolist() == [0, 1, 1, 2, 0, 0, 1, -1, 2]
    assert clusters(module, 3).tolist() == [0, 1, 1, -1, 0, 0, 1, -1, -1]
    assert clusters(module, 4).tolist() == [-1] * 9


@needs_infomap
def test_finds_identities():
    generator = torch.Generator().manual_seed(0)
    identity = torch.randint(6, (120,), generator=generator)
    x = torch.eye(12)[identity] + 0.1 * torch.randn(120, 12, generator=generator)
    x[5] = torch.eye(12)[8]
    labels = infomap_labels(x)
    assert labels[5] == -1
    others = torch.arange(120) != 5
    assert (labels >= 0)[others].all()
    assert torch.equal(
        (labels[:, None] == labels)[others][:, others], (identity[:, None] == identity)[others][:, others]
    )
    first = [labels.tolist().index(c) for c in range(int(labels.max()) + 1)]
    assert first == sorted(first)
    assert torch.equal(infomap_labels(x), labels)
    nearest = knn(F.normalize(x), 20)
    assert torch.equal(infomap_labels(x, knn=nearest), labels)


@needs_infomap
def test_min_size(clustered):
    x = clustered(200, 16, spread=0.9)
    everyone = infomap_labels(x, min_size=1)
    assert everyone.min() == 0
    size = everyone.bincount()
    assert len(size.unique()) > 3
    for least in (2, 5, 9):
        labels = infomap_labels(x, min_size=least)
        assert torch.equal(labels >= 0, (size >= least)[everyone])
        assert labels.max() + 1 == (size >= least).sum()


@needs_infomap
@pytest.mark.filterwarnings("ignore:.*more than the data have")
@pytest.mark.parametrize(
    ("x", "options", "expected"),
    [
        (torch.zeros(0, 3), {}, []),
        (torch.ones(1, 3), {}, [-1]),
        (torch.ones(1, 3), {"min_size": 1}, [0]),
        (torch.ones(6, 3), {}, [0] * 6),
        (torch.ones(6, 3), {"k1": 1}, [-1] * 6),
        (torch.zeros(6, 3), {}, [-1] * 6),
        (torch.eye(6), {}, [-1] * 6),
        (torch.ones(4, 3), {}, [-1] * 4),
    ],
)
def test_small_inputs(x, options, expected):
    assert infomap_labels(x, **options).tolist() == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.eye(9).long()}, TypeError, "infomap_labels: x must be floating point, got torch.int64"),
        ({"x": torch.full((9, 2), torch.inf)}, ValueError, "infomap_labels: x must be finite, got NaN or infinity"),
        ({"min_similarity": 0.0}, ValueError, r"infomap_labels: min_similarity must lie in \(0, 1\], got 0.0"),
        ({"k1": 0}, ValueError, "infomap_labels: k1 must be at least 1, got 0"),
        ({"min_size": 1.5}, TypeError, "infomap_labels: min_size must be an integer, got 1.5"),
        ({"seed": 0}, ValueError, "infomap_labels: seed must be at least 1, got 0"),
    ],
)
def test_rejects(options, error, message):
    with pytest.raises(error, match=message):
        infomap_labels(**{"x": torch.eye(9), **options})


@needs_infomap
def test_rejects_lists_of_other_rows():
    with pytest.raises(ValueError, match="infomap_labels: knn index must have one entry for each row of x"):
        infomap_labels(torch.eye(40), knn=(torch.zeros(40, 15), torch.zeros(39, 15).long()))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(_env, "infomap", lambda: _env.Capability("infomap", False, "pip install 'fastreid-u[infomap]'"))
    with pytest.raises(RuntimeError, match=r"infomap_labels: infomap must be installed, got none: pip install"):
        infomap_labels(torch.eye(9))


def test_is_not_imported_unless_asked_for():
    code = "import sys, fastreid_u.ops.infomap_labels as m; m._env.capabilities(); print('infomap' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@needs_infomap
def test_beside_faiss_in_one_process():
    """Both are wrapped by SWIG, and a shared iterator type once crashed Python where faiss had been loaded first."""
    pytest.importorskip("faiss", reason="faiss is not installed")
    code = (
        "import faiss, torch; from fastreid_u.ops.infomap_labels import infomap_labels\n"
        "noise = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))\n"
        "x = torch.eye(4).repeat_interleave(8, dim=0) + 0.01 * noise\n"
        "print(infomap_labels(x).unique().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 1, 2, 3]"
