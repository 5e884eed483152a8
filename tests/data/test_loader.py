# SPDX-License-Identifier: Apache-2.0
"""The loader: same batches for every number of workers, bad files reported and never fatal, pixels cached."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_u.data import BadImage, PixelCache, Sample, chunks, make_loader, test_transform, train_transform
from fastreid_u.data.images import read_pixels
from fastreid_u.data.transforms import Normalize, View

SIZE = (16, 8)  # height, width


@pytest.fixture
def samples(tmp_path):
    made = []
    for i in range(23):
        path = tmp_path / f"{i:04d}.jpg"
        pixels = np.random.default_rng(i).integers(0, 256, (20, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
        made.append(Sample(str(path), i // 4, i % 4))
    return made


def collect(batches):
    """(images, indices, paths of bad files) of an epoch, in its order."""
    batches = list(batches)
    images = torch.cat([batch.images for batch in batches])
    return images, torch.cat([batch.indices for batch in batches]), [bad.path for batch in batches for bad in batch.bad]


def test_workers_do_not_change_a_bit_and_survive_epochs(samples):
    view = train_transform(*SIZE, color_jitter=0.3, blur=0.5)
    alone = make_loader(samples, view, batch_size=5, seed=1)
    helped = make_loader(samples, view, batch_size=5, seed=1, workers=2)
    os.remove(samples[3].path)
    pids = set()
    for epoch in range(3):
        order = np.random.default_rng(epoch).integers(0, len(samples), 40)
        expected = collect(alone.epoch(chunks(order.tolist(), 5), seed=(1, epoch)))
        got = collect(helped.epoch(order.reshape(-1, 5), seed=(1, epoch)))  # any sequence of sequences
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert got[2] == expected[2]
        pids.add(tuple(worker.pid for worker in helped._workers._iterator._workers))
    assert len(pids) == 1  # the same processes in every epoch


def test_an_epoch_left_early_does_not_disturb_the_next(samples):
    view = train_transform(*SIZE)
    expected = collect(make_loader(samples, view, batch_size=4).epoch(chunks(range(20), 4), seed=9))
    for workers in (0, 2):
        loader = make_loader(samples, view, batch_size=4, workers=workers)
        next(loader.epoch(chunks(range(22, 0, -1), 4), seed=3))
        images, indices, _ = collect(loader.epoch(chunks(range(20), 4), seed=9))
        assert torch.equal(images, expected[0])
        assert indices.tolist() == list(range(20))


def test_close_ends_the_workers_and_a_later_epoch_has_new_ones(samples):
    loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)
    before = set(multiprocessing.active_children())
    held = loader.epoch()
    next(held)
    assert set(multiprocessing.active_children()) > before
    loader.close()
    assert set(multiprocessing.active_children()) == before
    assert sum(len(batch.indices) for batch in loader) == len(samples)
    loader.close()
    loader.close()
    make_loader(samples, test_transform(*SIZE), batch_size=4).close()


SCRIPT = """
import multiprocessing, sys
multiprocessing.set_start_method("spawn")
from fastreid_u.data import Sample, make_loader, test_transform
samples = [Sample(path, 0, 0) for path in sys.argv[1:]]
loader = make_loader(samples, test_transform(16, 8), batch_size=2, workers=1)
print(sum(len(batch.indices) for batch in loader), "images")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_a_script_without_a_guard_may_have_workers(samples, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, tmp_path / "script.py", *(sample.path for sample in samples[:4])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.stdout == "4 images\n", done.stderr


def test_where_workers_cannot_be_forked_the_guard_is_named(samples, monkeypatch):
    loader = make_loader(samples, test_transform(*SIZE), batch_size=4, workers=1)

    def bootstrapping(workers):
        raise RuntimeError("An attempt has been made to start a new process before ... its bootstrapping phase.")

    monkeypatch.setattr("fastreid_u.data.workers.Workers.__iter__", bootstrapping)
    with pytest.raises(RuntimeError, match=r"guarded by `if __name__ == '__main__':`.* or use workers=0$"):
        loader.epoch()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_dtype_changes_no_pixel(samples, workers):
    view = train_transform(*SIZE, erase=1.0)
    expected = collect(make_loader(samples, view, batch_size=4, workers=workers))[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(collect(make_loader(samples, view, batch_size=4, workers=workers))[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_draws_depend_on_seed_and_position_only(samples):
    loader = make_loader(samples, train_transform(*SIZE), batch_size=4)
    first, _, _ = collect(loader.epoch([[5, 5, 5, 5], [6]], seed=1))
    assert not torch.equal(first[0], first[1])  # another position, another view of the same image
    assert torch.equal(collect(loader.epoch([[5, 5, 5], [5, 6]], seed=1))[0], first)
    assert not torch.equal(collect(loader.epoch([[5, 5, 5, 5], [6]], seed=2))[0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_and_any_share_give_the_same_pictures(samples, workers):
    """What a resumed epoch and what several ranks read is, to the bit, what one process reads in one go."""
    view = (train_transform(*SIZE, color_jitter=0.3), train_transform(*SIZE, blur=0.5))
    loader = make_loader(samples, view, batch_size=4, workers=workers)
    batches = [[3, 3, 7, 1, 5], [2, 9], [11], [4, 3, 8, 6, 6, 0]]  # not all of one size
    whole = list(loader.epoch(batches, seed=(1, 2)))
    assert [loaded.indices.tolist() for loaded in whole] == batches
    for start in range(5):
        for ranks in (1, 2, 3, 4):
            shares = [list(loader.epoch(batches, seed=(1, 2), start=start, share=(r, ranks))) for r in range(ranks)]
            assert {len(share) for share in shares} == {len(batches) - start}
            for expected, *parts in zip(whole[start:], *shares, strict=True):
                sizes = [len(part.indices) for part in parts]
                assert max(sizes) - min(sizes) <= 1
                assert torch.equal(torch.cat([part.indices for part in parts]), expected.indices)
                for number, images in enumerate(expected.images):
                    assert torch.equal(torch.cat([part.images[number] for part in parts]), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1}, r"start must lie in \[0, 2\], got -1"),
        ({"start": 3}, r"start must lie in \[0, 2\], got 3"),
        ({"share": (2, 2)}, r"share must be \(rank, ranks\) with 0 <= rank < ranks, got \(2, 2\)"),
        ({"share": (-1, 2)}, r"share must be .*, got \(-1, 2\)"),
    ],
)
def test_rejects_what_is_no_start_and_no_share(samples, arguments, message):
    with pytest.raises(ValueError, match=f"make_loader: {message}"):
        make_loader(samples, test_transform(*SIZE), batch_size=4).epoch([[0], [1]], **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_of_one_loader_at_once(samples, workers):
    """Each is what it is alone, whatever the number of workers."""
    loader = make_loader(samples, train_transform(*SIZE), batch_size=4, workers=workers)
    alone = list(loader)
    pairs = list(zip(loader, loader, strict=True))
    assert len(pairs) == len(loader)
    for expected, pair in zip(alone, pairs, strict=True):
        assert all(torch.equal(loaded.images, expected.images) for loaded in pair)
    begun = loader.epoch()
    next(begun)
    assert [loaded.indices.tolist() for loaded in loader.epoch([[5], [6]])] == [[5], [6]]
    loader.close()
    assert len(begun) == len(list(begun)) == len(alone) - 1, "it goes on where it was"


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.asarray, torch.tensor])
def test_seeds_and_indices_of_any_kind_of_integer(samples, kind):
    loader = make_loader(samples, train_transform(*SIZE), batch_size=4, seed=(kind(1), kind(2)))
    expected = collect(make_loader(samples, train_transform(*SIZE), batch_size=4).epoch(seed=(1, 2)))[0]
    assert torch.equal(collect(loader)[0], expected)
    one = collect(loader.epoch([[kind(3), kind(4)]], seed=kind(5)))
    assert torch.equal(one[0], collect(loader.epoch([[3, 4]], seed=5))[0])
    assert one[1].tolist() == [3, 4]


@pytest.mark.parametrize("seed", [-1, 0.5, "1", (), (1, -1), None])
def test_rejects_what_is_no_seed(samples, seed):
    with pytest.raises(ValueError, match="make_loader: seed must be one or several integers of 0 or more, got"):
        make_loader(samples, test_transform(*SIZE), batch_size=4, seed=seed)


@pytest.mark.parametrize("batch", [[0.5], ["1"], [[1]], [True]])
def test_rejects_what_is_no_index_before_anything_is_read(samples, batch):
    with pytest.raises(TypeError, match="make_loader: batches must hold lists of integers, got"):
        make_loader(samples, test_transform(*SIZE), batch_size=4).epoch([[0], batch])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [False, True])
def test_a_default_device_that_is_not_the_cpu(samples, workers, cache):
    view = train_transform(*SIZE, erase=1.0)
    expected = collect(make_loader(samples, view, batch_size=4))[0]
    torch.set_default_device("meta")  # stands for a GPU
    try:
        loader = make_loader(samples, view, batch_size=4, workers=workers, cache=cache)
        batches = list(loader)
        loader.close()
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_chunks():
    assert chunks(range(5), 2) == [range(2), range(2, 4), range(4, 5)]
    assert chunks([], 2) == []


def test_global_generators_are_left_alone(samples):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(make_loader(samples, train_transform(*SIZE), batch_size=4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_all_samples_in_their_order(samples):
    loader = make_loader(samples, test_transform(*SIZE), batch_size=5)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert [len(batch.indices) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
    assert batches[0].images.shape == (5, 3, *SIZE)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].indices.dtype == torch.int64


def test_pixels_are_those_of_pillow(samples):
    """Bicubic as Pillow resizes, then (x / 255 - mean) / std."""
    batch = next(iter(make_loader(samples, View(*SIZE, (Normalize((0,) * 3, (1,) * 3),)), batch_size=1)))
    with Image.open(samples[0].path) as image:
        expected = np.asarray(image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal((batch.images[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_several_views_of_one_decode(samples):
    views = (train_transform(*SIZE), train_transform(*SIZE), test_transform(*SIZE))
    plain = next(iter(make_loader(samples, test_transform(*SIZE), batch_size=6)))
    batch = next(iter(make_loader(samples, views, batch_size=6)))
    assert len(batch.images) == 3
    assert torch.equal(batch.images[2], plain.images)
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_named(samples, workers):
    (empty, cut, text, gone) = (samples[i].path for i in (1, 4, 7, 9))
    open(empty, "wb").close()
    os.truncate(cut, os.path.getsize(cut) // 2)
    with open(text, "w") as file:
        file.write("not an image")
    os.remove(gone)
    loader = make_loader(samples, test_transform(*SIZE), batch_size=5, workers=workers)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [3, 3, 5, 5, 3]
    assert 1 not in torch.cat([batch.indices for batch in batches])
    bad = {error.path: error.reason for batch in batches for error in batch.bad}
    assert list(bad) == [empty, cut, text, gone]
    assert all(isinstance(error, BadImage) for batch in batches for error in batch.bad)
    assert bad[empty] == "empty file"
    assert "truncated" in bad[cut].lower()
    assert "not an image" in bad[text]
    assert bad[gone] == "file not found"


def test_a_batch_with_no_good_image_is_empty(samples):
    for sample in samples[:2]:
        os.remove(sample.path)
    batch = next(iter(make_loader(samples, (test_transform(*SIZE),) * 2, batch_size=2)))
    assert [images.shape for images in batch.images] == [(0, 3, *SIZE)] * 2
    assert batch.indices.shape == (0,)
    assert len(batch.bad) == 2


def test_a_file_that_vanishes_between_epochs(samples):
    loader = make_loader(samples, test_transform(*SIZE), batch_size=23)
    assert next(iter(loader)).bad == []
    os.remove(samples[11].path)
    assert [bad.path for bad in next(iter(loader)).bad] == [samples[11].path]


class TestCache:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_same_pixels_and_no_second_read(self, samples, workers):
        view = train_transform(*SIZE)
        expected = collect(make_loader(samples, view, batch_size=4).epoch(seed=2))[0]
        loader = make_loader(samples, view, batch_size=4, cache=True, workers=workers)
        assert torch.equal(collect(loader.epoch(seed=2))[0], expected)
        assert loader.cache.ready.all()
        for sample in samples:
            os.remove(sample.path)
        images, _, bad = collect(loader.epoch(seed=2))
        assert bad == []
        assert torch.equal(images, expected)

    def test_one_cache_for_two_loaders(self, samples):
        cache = PixelCache(len(samples), *SIZE)
        list(make_loader(samples, test_transform(*SIZE), batch_size=4, cache=cache))
        for sample in samples:
            os.remove(sample.path)
        assert not any(b.bad for b in make_loader(samples, train_transform(*SIZE), batch_size=4, cache=cache))

    def test_bad_images_stay_bad(self, samples):
        os.truncate(samples[0].path, 0)
        loader = make_loader(samples, test_transform(*SIZE), batch_size=23, cache=True)
        for _ in range(2):
            assert [bad.path for bad in next(iter(loader)).bad] == [samples[0].path]

    def test_views_do_not_write_into_it(self, samples):
        """Every step gets the cache's own memory."""
        view = train_transform(*SIZE, color_jitter=0.5, grey=0.5, blur=0.5, erase=1.0)
        loader = make_loader(samples, view, batch_size=4, cache=True)
        for epoch in range(4):
            list(loader.epoch(seed=epoch))
        for pixels, sample in zip(loader.cache.pixels, samples, strict=True):
            assert torch.equal(pixels, read_pixels(sample.path, *SIZE))

    def test_shared_memory_that_is_too_small(self, samples, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(free=1000))
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm on this system")
        with pytest.raises(MemoryError, match="free in /dev/shm; use workers=0"):
            make_loader(samples, test_transform(*SIZE), batch_size=4, cache=True, workers=1)


class _Usage:
    def __init__(self, free):
        self.free = free


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        ({"workers": -1}, ValueError, "workers must not be negative, got -1"),
        ({"transform": ()}, ValueError, "transform must be one view or several of equal size"),
        ({"transform": (test_transform(4, 4), test_transform(4, 5))}, ValueError, "of equal size"),
        ({"cache": PixelCache(3, *SIZE)}, ValueError, "cache must have the shape"),
        ({"cache": PixelCache(23, *SIZE), "workers": 1}, ValueError, "cache must be shared=True"),
    ],
)
def test_rejects(samples, arguments, error, message):
    settings = {"transform": test_transform(*SIZE), "batch_size": 4} | arguments
    with pytest.raises(error, match=message):
        make_loader(samples, settings.pop("transform"), **settings)


@pytest.mark.parametrize("index", [-1, 23])
def test_rejects_indices_out_of_range(samples, index):
    with pytest.raises(IndexError, match=rf"batches must hold indices in \[0, 23\), got {index}"):
        list(make_loader(samples, test_transform(*SIZE), batch_size=4).epoch([[0, index]]))
