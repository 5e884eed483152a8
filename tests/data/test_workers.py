# SPDX-License-Identifier: Apache-2.0
"""Workers: started in each way with the same pictures, and no wait for them is without end."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_u.data import Sample, make_loader, test_transform, train_transform
from fastreid_u.data.contexts import Flag, context
from fastreid_u.data.reader import Task
from fastreid_u.data.transforms import View
from fastreid_u.data.workers import TIMEOUT_VARIABLE

SIZE = (16, 8)  # height, width
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
Usage = namedtuple("Usage", "free")


@pytest.fixture
def samples(tmp_path):
    made = []
    for i in range(12):
        path = tmp_path / f"{i:04d}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(path)
        made.append(Sample(str(path), i // 4, i % 4))
    return made


@dataclass(frozen=True)
class Blocked:
    """A step that waits for a byte that never comes."""

    pipe: int

    def __call__(self, image, rng):
        os.read(self.pipe, 1)
        return image


@dataclass(frozen=True)
class Ends:
    """A step at which the worker ends at once, as one does that runs out of memory."""

    how: int

    def __call__(self, image, rng):
        os.kill(os.getpid(), self.how)
        return image


def pictures(batches):
    return torch.cat([loaded.images for loaded in batches])


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_every_way_to_start_workers_gives_the_same_pictures(samples, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    view = train_transform(*SIZE, color_jitter=0.3, blur=0.5)
    expected = pictures(make_loader(samples, view, batch_size=5, seed=(1, 2)))
    for cache in (False, True):
        loader = make_loader(samples, view, batch_size=5, seed=(1, 2), workers=2, worker_start=start, cache=cache)
        assert torch.equal(pictures(loader), expected)
        assert torch.equal(pictures(loader), expected)
        loader.close()


@pytest.mark.skipif("spawn" not in multiprocessing.get_all_start_methods(), reason="not on this system")
def test_all_that_spawned_workers_get_can_be_pickled_and_reads_the_same(samples):
    """What a spawned worker runs, without the seconds in which it imports torch."""
    view = (train_transform(*SIZE, color_jitter=0.3, blur=0.5, grey=0.5), test_transform(*SIZE))
    loader = make_loader(samples, view, batch_size=5, seed=4, workers=1, worker_start="spawn")
    copy = multiprocessing.reduction.ForkingPickler.loads(
        multiprocessing.reduction.ForkingPickler.dumps(loader._workers.dataset)
    )
    here = next(make_loader(samples, view, batch_size=5, seed=4).epoch())
    there = copy.reader([Task((4,), i, i, samples[i].path) for i in range(5)])
    assert all(map(torch.equal, here.views, there.views))


def test_a_transform_that_cannot_be_pickled_is_named(samples):
    view = View(*SIZE, (lambda image, rng: image.float(),))
    with pytest.raises(TypeError, match=r"transform must be picklable .* worker_start='fork' or workers=0"):
        make_loader(samples, view, batch_size=4, workers=1, worker_start="spawn").epoch()


def test_an_unknown_way_to_start_is_named(samples):
    with pytest.raises(ValueError, match=r"worker_start must be one of .*, or None, got 'thread'"):
        make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1, worker_start="thread")


@linux
@pytest.mark.parametrize("whose", ["torch", "numpy"])
def test_a_fork_while_another_thread_draws_random_numbers(samples, monkeypatch, whose):
    """The generator that the thread draws from is locked for ever in the child, which is seeded all the same."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, "20")
    done, drawing = threading.Event(), threading.Event()
    numbers = torch.empty(4_000_000)

    def draw():
        while not done.is_set():
            drawing.set()
            numbers.normal_() if whose == "torch" else np.random.standard_normal(4_000_000)  # noqa: NPY002

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        drawing.wait()
        loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=2)
        assert len(pictures(loader)) == len(samples)
        loader.close()
    finally:
        done.set()
        thread.join()


def test_an_interrupt_is_for_the_parent(samples):
    """Ctrl-C reaches all processes of a terminal: workers that ended by it were taken for killed ones."""
    loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
    reading = loader.epoch()
    next(reading)
    (worker,) = loader._workers._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    assert sum(len(loaded.indices) for loaded in reading) == len(samples) - 4
    assert worker.is_alive()
    loader.close()


def test_workers_end_with_the_loader(samples):
    before = set(multiprocessing.active_children())
    loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
    assert len(pictures(loader)) == len(samples)
    assert set(multiprocessing.active_children()) > before
    del loader
    assert set(multiprocessing.active_children()) == before


class TestTooLittleSharedMemory:
    @pytest.fixture
    def little(self, monkeypatch):
        """``little(bytes)``: so much is free."""
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm on this system")
        return lambda free: monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free))

    def test_the_loader_reads_in_this_process_and_warns_once(self, samples, little):
        expected = pictures(make_loader(samples, train_transform(*SIZE), batch_size=4))
        loader = make_loader(samples, train_transform(*SIZE), batch_size=4, workers=1)
        batch = 4 * 3 * 16 * 8 * 4
        little(4 * batch - 1)  # two batches ahead, two in use
        with pytest.warns(RuntimeWarning, match=r"shared memory must hold .* workers=0.*--shm-size") as seen:
            got = [pictures(loader) for _ in range(2)]
        assert all(torch.equal(images, expected) for images in got)
        assert len(seen) == 1
        assert multiprocessing.active_children() == []

    def test_just_enough_is_enough_and_is_counted_for_all_loaders(self, samples, little):
        loaders = [make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1) for _ in range(2)]
        little(4 * 4 * 3 * 16 * 8 * 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reading = loaders[0].epoch()
            assert len(list(reading)) == 3
            reading = loaders[0].epoch()  # what the first epoch had is free again
        with pytest.warns(RuntimeWarning, match="--shm-size"):
            assert len(list(loaders[1])) == 3
        assert len(list(reading)) == 3
        for loader in loaders:
            loader.close()

    @linux
    def test_a_worker_that_gets_none_after_all_ends_the_epoch(self, samples, monkeypatch):
        def full(tensor):
            raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # forked workers have it too
        loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
        with pytest.raises(MemoryError, match=r"must fit into shared memory, got unable.*\(28\); use workers=0.*--shm"):
            next(loader.epoch())
        assert multiprocessing.active_children() == []


def ends_with(flag):
    os._exit(7 if flag.is_set() else 1)


@linux
class TestAWorkerThatDeliversNothing:
    def test_blocked_in_an_image(self, samples, monkeypatch):
        """A file system that does not answer, say."""
        monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
        ends = os.pipe()
        loader = make_loader(samples, View(*SIZE, (Blocked(ends[0]),)), batch_size=4, workers=1)
        with pytest.raises(TimeoutError, match=rf"a batch within 0.3 s, got none: .*workers=0.*{TIMEOUT_VARIABLE}"):
            next(loader.epoch())
        assert multiprocessing.active_children() == []
        for end in ends:
            os.close(end)

    def test_stopped_with_a_batch_in_its_hands(self, samples, monkeypatch):
        """The message of the batch has come, but the worker does not hand over the memory that it lies in."""
        monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
        loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
        reading = loader.epoch()
        next(reading)
        (worker,) = loader._workers._iterator._workers
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="a stopped process"):
            list(reading)
        assert not worker.is_alive()

    @pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
    def test_ended_while_it_asks_whether_to_end(self, start):
        """What it asks has no lock that would never be free again."""
        processes = context(start)
        flag = processes.Event()
        assert isinstance(flag, Flag)
        flag.set()
        worker = processes.Process(target=ends_with, args=(flag,))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 7
        assert not processes.Event().is_set()

    def test_in_the_middle_of_an_epoch_that_was_left(self, samples, monkeypatch):
        """Beginning the next epoch waits for the end of the one before."""
        monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
        loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
        next(loader.epoch())
        (worker,) = loader._workers._iterator._workers
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            loader.epoch()
        loader.close()
        assert not worker.is_alive()
        assert len(pictures(loader)) == len(samples), "with new workers"
        loader.close()

    def test_stopped_when_the_loader_is_closed(self, samples, monkeypatch):
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # torch's wait before it kills
        loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
        list(loader)
        (worker,) = loader._workers._iterator._workers
        os.kill(worker.pid, signal.SIGSTOP)
        loader.close()
        worker.join(10)
        assert not worker.is_alive()

    def test_killed(self, samples):
        loader = make_loader(samples, View(*SIZE, (Ends(signal.SIGKILL),)), batch_size=4, workers=1)
        with pytest.raises(RuntimeError, match=r"make_loader: workers must live .*one that died .*use fewer workers"):
            next(loader.epoch())
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
    def test_a_time_limit_that_is_none(self, samples, monkeypatch, text):
        monkeypatch.setenv(TIMEOUT_VARIABLE, text)
        with pytest.raises(ValueError, match=f"{TIMEOUT_VARIABLE} must be a positive number of seconds, got '{text}'"):
            make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
