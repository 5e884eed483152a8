# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Turns Triton's interpreter on before anything imports triton: a kernel reads it when defined."""

import contextlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(
    1
)  # the tests' arrays are small, and threads that wait for a busy core cost far more than they give


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


class Golden(dict):
    """The arrays of one file by name, and its ``meta`` record."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            super().__init__({name: stored[name] for name in stored.files if name != "meta"})
            self.meta = json.loads(str(stored["meta"]))

    def tensor(self, name: str) -> torch.Tensor:
        """An array as a tensor; stored int16 and int32 indices widen to int64."""
        array = self[name]
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "i" else array)

    def matrix(self, name: str) -> np.ndarray:
        """A symmetric distance matrix, stored whole or as its upper triangle below 1."""
        if name in self:
            return self[name]
        rowptr, column, value = (self[f"{name}_{part}"] for part in ("rowptr", "col", "val"))
        row = np.repeat(np.arange(len(rowptr) - 1), np.diff(rowptr))
        full = np.ones((len(rowptr) - 1,) * 2, np.float32)
        full[row, column] = full[column, row] = value
        return full


@pytest.fixture
def golden():
    """``golden(name)`` loads ``tests/golden/<name>.npz``."""
    folder = Path(__file__).parent / "golden"
    return lambda name: Golden(folder / f"{name}.npz")


@pytest.fixture
def seed():
    """``seed(n)`` seeds Python, NumPy and torch and returns a torch generator."""

    def plant(number: int = 0) -> torch.Generator:
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 - code under test may draw from the global state
        torch.manual_seed(number)
        return torch.Generator().manual_seed(number)

    return plant


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory full of nonsense: what a kernel forgets to write shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            fresh = make(*args, **kwargs)
            if fresh.is_meta:  # there is no memory to fill
                return fresh
            return fresh.fill_(torch.nan if fresh.is_floating_point() else -7 if fresh.dtype != torch.bool else True)

        return made

    with torch.device("cpu"):  # at its first use torch notes which functions make tensors: not the poisoned ones
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


class TorchCalls(TorchDispatchMode):
    """What torch's own operators do inside the block, whatever Python function of torch led to them.

    Attributes:
        bytes: storage that they made; ``largest`` of one tensor.
        computed: names of those that compute or fill: on a GPU each is a launch. Views and empty memory are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0
        self.computed: list[str] = []
        self._storages = {}  # kept, so that none is made anew at an address that was counted

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self._new(args, kwargs)
        result = operator(*args, **(kwargs or {}))
        for size in self._new(result):
            self.bytes += size
            self.largest = max(self.largest, size)
        name = operator.name()
        if not operator.is_view and "empty" not in name:
            self.computed.append(name)
        return result

    def _new(self, *trees) -> list[int]:
        """Sizes of the storages that were not there before."""
        found = [leaf.untyped_storage() for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
        new = {storage._cdata: storage for storage in found if storage._cdata not in self._storages}
        self._storages |= new
        return [storage.nbytes() for storage in new.values()]


@pytest.fixture
def torch_calls():
    """``with torch_calls() as calls:`` what torch runs and allocates there."""
    return TorchCalls


@pytest.fixture
def launches(monkeypatch):
    """``launches(*modules)``: their Triton kernels rest; a list of what would be launched, as (kernel, grid)."""

    def watch(*modules) -> list[tuple[str, tuple]]:
        made = []

        class Recorder:
            def __init__(self, name):
                self.name = name

            def __getitem__(self, grid):
                return lambda *args, **kwargs: made.append((self.name, grid))

        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Recorder(name))
        return made

    return watch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a case runs that a GPU has in common with a CPU."""
    return torch.device(request.param)


@pytest.fixture
def exact_sums():
    """``exact_sums(*tensors)``: what a test of bits multiplies. On a GPU, as given; interpreted, multiples of 1/16.

    Triton's interpreter leaves products to NumPy, whose BLAS adds the terms of a row in an order that depends on the
    row's place and on the processor. Multiples of 1/16 within 1 have products that any order adds to the same float32.
    """

    def rounded(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t if torch.cuda.is_available() else (16 * t).round().clamp(-16, 16) / 16 for t in tensors]

    return rounded


@pytest.fixture
def clustered():
    """``clustered(n, d)`` makes (n, d) unit features around n / 12 identities, with a few outliers."""

    def make(n: int, d: int, *, number: int = 0, spread: float = 0.6, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(number)
        centres = torch.nn.functional.normalize(
            torch.randn(max(2, n // 12), d, generator=generator, dtype=torch.float64)
        )
        identity = torch.randint(len(centres), (n,), generator=generator)
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * (spread / d**0.5)
        noise[::10] *= 5
        return torch.nn.functional.normalize(centres[identity] + noise).to(dtype)

    return make


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder in Market-1501 layout: 6 rendered people to train on and 4 to test, 3 cameras, 64 x 32 pixels."""
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    dials = SyntheticConfig(
        train_ids=6, test_ids=4, cameras=3, images_per_camera=4, camera_presence=1.0, distractors=1, height=64, width=32
    )
    return generate(dials, tmp_path_factory.mktemp("world"), workers=1)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """Another such world, of other people and cameras, to learn from with labels."""
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    dials = SyntheticConfig(
        train_ids=6, test_ids=1, cameras=2, images_per_camera=4, camera_presence=1.0, distractors=0, height=64,
        width=32, seed=1,
    )  # fmt: skip
    return generate(dials, tmp_path_factory.mktemp("source"), workers=1)


@pytest.fixture(scope="session")
def jpeg(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "crop.jpg"
    Image.new("RGB", (4, 8), (90, 60, 30)).save(path)
    return path.read_bytes()


@pytest.fixture
def plant(tmp_path, jpeg):
    """``plant(folder, names...)`` writes a small JPEG for each name, and returns the folder."""

    def write(folder, *names):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
        return tmp_path / folder

    return write


@pytest.fixture
def power_cut():
    """``with power_cut(epoch):`` a training that breaks where it would fit that epoch."""
    from fastreid_u.engine import loop

    @contextlib.contextmanager
    def cut(epoch):
        fit = loop.fit_epoch

        def fails(session, current, targets):
            if current == epoch:
                raise RuntimeError("pulled the plug")
            return fit(session, current, targets)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "fit_epoch", fails)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                yield

    return cut


@pytest.fixture
def smoke(tiny_world, tmp_path):
    """``smoke(method, **settings)`` trains two epochs of three steps on the tiny world and returns the run."""
    import fastreid_u
    from fastreid_u.data import load_dataset

    tiny = dict(
        height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=3,
        epochs=2, workers=0, k1=8, k2=3, eps=0.6, center_per_camera=True, calibrate_bn=2, amp="off", seed=1,
        eval_step=1, quiet=True, device="cpu",
    )  # fmt: skip

    def run(method, folder="run", **settings):
        dataset = load_dataset("market1501", tiny_world)
        return fastreid_u.train(dataset, method=method, logs_dir=tmp_path / folder, **{**tiny, **settings})

    return run


@pytest.fixture
def all_cores():
    """For what a CPU gives at sizes for which one thread would take minutes of a GPU's time."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
