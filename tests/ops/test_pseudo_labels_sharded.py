# SPDX-License-Identifier: Apache-2.0
"""Any number of ranks, one result: threads as ranks for many cases, processes over gloo for the real exchange."""

import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fastreid_u.cpu import pseudo_labels_sharded as sharded
from fastreid_u.ops.pseudo_labels import pseudo_labels


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, world):
        self.world, self.barrier, self.held = world, threading.Barrier(world), [None] * world

    def run(self, call):
        """``call(rank)`` on every rank; what they returned."""
        found = [None] * self.world

        def one(rank):
            try:
                found[rank] = call(Member(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Member:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world = ranks, rank, ranks.world

    def gather(self, own):
        self.ranks.held[self.rank] = own
        self.ranks.barrier.wait(60)
        found = np.concatenate(self.ranks.held)
        self.ranks.barrier.wait(60)
        return found


def features(case):
    """Clustered, copied, collapsed, unstructured; with lists of a search or, in some, any lists."""
    rng = np.random.default_rng(case)
    n = [1, 2, 3, 5, 41, 90, 133, 180][case % 8]
    x = rng.normal(size=(n, 8))
    kind = ["identities", "identical", "noise", "copies"][case % 4]
    if kind == "identities":
        x = x[rng.integers(0, n // 12 + 1, n)] + 0.4 * x
    elif kind == "identical":
        x[:] = 1
    elif kind == "copies":
        x = x[rng.integers(0, n // 4 + 1, n)]
    x = x.astype(np.float32)
    k1 = min(n, int(rng.integers(1, 31)))
    distance = np.square(x[:, None] - x).sum(-1)
    np.fill_diagonal(distance, -1)
    lists = distance.argsort(axis=1, kind="stable")[:, :k1].astype(np.int32)
    if case % 5 == 4:
        lists = np.stack([rng.choice(n, k1, replace=False) for _ in range(n)]).astype(np.int32)
    return x, lists, int(rng.integers(1, min(k1, 7) + 1)), int(rng.integers(1, 9))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("case", range(16))
def test_every_rank_has_the_labels_of_one(case, world):
    x, lists, k2, min_samples = features(case)
    eps = [0.6, 0.3, 0.85]
    options = {"compat": case % 3 == 0, "threads": 1 + case % 2}
    index = torch.from_numpy(lists).long()
    one = pseudo_labels(
        torch.from_numpy(x), eps=eps, min_samples=min_samples, k1=lists.shape[1], k2=k2,
        knn=(torch.zeros(lists.shape), index), compat=options["compat"], backend="cpp",
    )  # fmt: skip
    expected = one.numpy()
    found = Threads(world).run(lambda rank: sharded.pseudo_labels(x, lists, k2, eps, min_samples, rank, **options))
    for labels in found:
        np.testing.assert_array_equal(labels, expected)


def test_rows_of_the_encoding_are_those_of_one_rank(clustered):
    x = clustered(150, 12, spread=0.9).numpy()
    distance = np.square(x[:, None] - x).sum(-1)
    lists = distance.argsort(axis=1, kind="stable")[:, :12].astype(np.int32)
    one, *_ = Threads(1).run(lambda rank: sharded.encode_sorted(x, lists, 4, rank, compat=False, threads=1))
    for rows in Threads(4).run(lambda rank: sharded.encode_sorted(x, lists, 4, rank, compat=False, threads=1)):
        for part, expected in zip(rows, one, strict=True):
            np.testing.assert_array_equal(part, expected)
    assert (np.add.reduceat(one.mass, one.indptr[:-1]) == 4 * 2**28).all()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("work", [[], [0], [5], [0] * 20, [100, 0, 0, 0, 1], [1] * 19, [0, 0, 90, 3, 80, 0, 7]])
def test_shares_cover_the_work_once_and_fairly(work, world):
    work = np.array(work, np.int64)
    members = [Member(Threads(world), rank) for rank in range(world)]
    for shares in (
        [sharded.share_of_work(work, r) for r in members],
        [sharded.equal_share(len(work), r) for r in members],
    ):
        assert [i for share in shares for i in share] == list(range(len(work)))
    fair = (work + 1).sum() / world
    for share in [sharded.share_of_work(work, r) for r in members]:
        assert (work[share.start : share.stop] + 1).sum() <= fair + (work + 1).max(initial=0)


def test_collapsed_features_leave_nothing_to_walk(monkeypatch):
    """Forests are merged before columns are compared: then one set holds all, and no column can tell cores apart."""
    x = np.ones((240, 8), np.float32)
    lists = np.concatenate([np.arange(240)[:, None], np.tile(np.arange(29), (240, 1))], axis=1).astype(np.int32)
    walked = []
    share = sharded.share_of_work

    def watched(work, ranks):
        walked.append(work)
        return share(work, ranks)

    monkeypatch.setattr(sharded, "share_of_work", watched)
    for labels in Threads(3).run(lambda rank: sharded.pseudo_labels(x, lists, 6, [0.6], 4, rank)):
        assert (labels == 0).all()
    asked = [(len(work), int(work.sum()) > 0) for work in walked]
    for what in ((0, False), (240, True), (240, False)):  # doubtful rows, columns, cores: on each of three ranks
        assert asked.count(what) == 3
    assert len(asked) == 9


def test_a_backend_of_ones_own_does_not_go_with_a_group():
    with pytest.raises(ValueError, match=r"backend must be 'auto' with a group, got 'cpp'"):
        pseudo_labels(torch.eye(40), group="world", backend="cpp")


CASES = {
    "identities": dict(n=203),
    "identical": dict(n=50),
    "fewer rows than ranks": dict(n=3, k1=2, k2=1, min_samples=2),
    "one row": dict(n=1, k1=1, k2=1),
    "none": dict(n=0),
}


def make(name, n):
    generator = torch.Generator().manual_seed(0)
    if name == "identical":
        return torch.ones(n, 6)
    return torch.nn.functional.normalize(
        torch.randn(17, 12, generator=generator)[torch.arange(n) % 17] + 0.5 * torch.randn(n, 12, generator=generator)
    )


def worker(rank, world, folder):
    """One process: every case in groups of 1, 2, 3 and 4, then faults that every rank must hear of."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for size in range(1, world + 1):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for name, options in CASES.items():
            options = dict(options)
            x = make(name, options.pop("n"))
            found[name, size] = pseudo_labels(x, eps=[0.5, 0.6], group=group, **options)
    x = make("identities", 203)
    given = torch.cdist(x, x).sort(dim=1)
    found["lists"] = pseudo_labels(x, knn=(given.values[:, :30] ** 2, given.indices[:, :30]), group="world")
    swapped = given.indices[:, [0, 2, 1, *range(3, 30)]]
    for name, change in {
        "nan": {"x": x.clone().fill_(torch.nan) if rank == 2 else x},
        "other features": {"x": x + 1e-6 * (rank == 3)},
        "other rows": {"x": x[: len(x) - (rank == 1)]},
        "other order": {"x": x.flip(0) if rank == 1 else x},
        "other eps": {"x": x, "eps": 0.6 + 0.1 * (rank == 1)},
        "one eps or several": {"x": x, "eps": 0.5 if rank == 2 else [0.5]},
        "other columns": {"x": x.flip(1) if rank == 3 else x},
        "other order in lists": {
            "x": x,
            "knn": (given.values[:, :30], swapped if rank == 1 else given.indices[:, :30]),
        },
        "other lists": {"x": x, "knn": (given.values, given.indices if rank else given.indices.flip(1))},
        "bad eps": {"x": x, "eps": 1.5},
        "bad type": {"x": "features" if rank == 0 else x},
    }.items():
        try:
            pseudo_labels(**change, group="world")
            found[name] = "nothing raised"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    try:
        pseudo_labels(x, group=dist.new_group([0]))
    except ValueError as error:
        found["group"] = str(error)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What four processes found; they start once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (4, str(folder)), nprocs=4)
    return [torch.load(folder / str(rank)) for rank in range(4)]


@pytest.mark.filterwarnings("ignore:.*clipped to them")
@pytest.mark.parametrize("name", CASES)
def test_processes(answers, name):
    options = dict(CASES[name])
    x = make(name, options.pop("n"))
    expected = pseudo_labels(x, eps=[0.5, 0.6], **options)
    assert name != "identities" or expected.max() > 5
    seen = 0
    for rank, found in enumerate(answers):
        for size in range(rank + 1, 5):
            assert torch.equal(found[name, size], expected), f"rank {rank} of {size}"
            seen += 1
    assert seen == 10


def test_processes_with_ready_lists(answers):
    expected = pseudo_labels(make("identities", 203))
    for found in answers:
        assert torch.equal(found["lists"], expected)


DIFFER = "ValueError: pseudo_labels: features and settings must be the same on every rank, got others on rank {}"


@pytest.mark.parametrize(
    ("name", "own", "heard", "by"),
    [
        (
            "nan",
            "ValueError: pseudo_labels: x must be finite, got NaN or infinity in 203 of 203 rows",
            "fault on rank 2",
            2,
        ),
        ("bad type", "TypeError: pseudo_labels: x must be a tensor or an array", "fault on rank 0", 0),
        ("other features", DIFFER.format(3), DIFFER.format(3), None),
        ("other rows", DIFFER.format(1), DIFFER.format(1), None),
        ("other order", DIFFER.format(1), DIFFER.format(1), None),
        ("other eps", DIFFER.format(1), DIFFER.format(1), None),
        ("one eps or several", DIFFER.format(2), DIFFER.format(2), None),
        ("other columns", DIFFER.format(3), DIFFER.format(3), None),
        ("other order in lists", DIFFER.format(1), DIFFER.format(1), None),
        ("other lists", DIFFER.format(1), DIFFER.format(1), None),
        ("bad eps", "", r"eps must lie in (0, 1), got 1.5", None),
    ],
)
def test_a_fault_on_one_rank_is_heard_on_all(answers, name, own, heard, by):
    for rank, found in enumerate(answers):
        assert (own if rank == by else heard) in found[name]


def test_a_group_of_others_is_refused(answers):
    assert ["group" in found for found in answers] == [False, True, True, True]
    assert answers[1]["group"] == "pseudo_labels: group must hold this process, got one without it"


def test_needs_torch_distributed():
    with pytest.raises(RuntimeError, match=r"pseudo_labels: group must belong to torch\.distributed, got it not init"):
        pseudo_labels(torch.eye(40), group="world")


@pytest.fixture
def single(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("single")
def test_what_is_not_a_group_is_refused():
    with pytest.raises(ValueError, match="group must be a process group or 'world', got 'all'"):
        pseudo_labels(torch.eye(40), group="all")
    with pytest.raises(TypeError, match="group must be a process group or 'world', got int"):
        pseudo_labels(torch.eye(40), group=3)


@pytest.mark.usefixtures("single")
def test_copies_more_than_k1_are_listed_as_knn_lists_them():
    from fastreid_u.ops import pseudo_labels_sharded as module
    from fastreid_u.ops.knn import knn

    x = torch.ones(30, 3)
    x[20:] += torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    step = module.LabelStep(x, eps=[0.6], min_samples=4, k1=6, k2=2, knn=None, compat=False)
    assert torch.equal(module.share_search(step, module.Ranks("test", "world"))[1], knn(x, 6)[1])


@pytest.mark.usefixtures("single")
def test_without_numba_the_search_is_shared_and_the_rest_repeated(monkeypatch, clustered):
    from fastreid_u import _env

    x = clustered(90, 8)
    expected = pseudo_labels(x, k1=10)
    monkeypatch.setattr(_env, "numba", lambda: _env.Capability("numba", False, "gone"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reference says that it is slow
        assert torch.equal(pseudo_labels(x, k1=10, group="world"), expected)


@pytest.mark.usefixtures("single")
def test_a_default_device_is_not_that_of_the_features(clustered):
    x = clustered(60, 8)
    expected = pseudo_labels(x, k1=10)
    torch.set_default_device("meta")
    try:
        found = pseudo_labels(x, k1=10, group="world")
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
