# SPDX-License-Identifier: Apache-2.0
"""Identity samplers: exact structure, and frequencies of 400 to 600 passes against those of the published code."""

import warnings
from itertools import chain

import numpy as np
import pytest

from fastreid_u.data import (
    ClassUniformly,
    MoreCamera,
    RandomMultipleGallery,
    iterations,
)

# Published name of the golden arrays, and ours. Two classes of the file are not offered: ICE's own variant
# of RandomMultipleGallery, and RandomIdentitySampler, which no method uses.
SAMPLERS = {
    "cc_RandomMultipleGallerySampler": lambda pids, cams, k, **kw: RandomMultipleGallery(pids, cams, k, **kw),
    "cc_NoCam": lambda pids, cams, k, **kw: RandomMultipleGallery(pids, None, k, **kw),
    "ice_MoreCameraSampler": lambda pids, cams, k, **kw: MoreCamera(pids, cams, k, **kw),
    "cap_ClassUniformlySampler": lambda pids, cams, k, **kw: ClassUniformly(pids, k, **kw),
}


def no_cam(pids, num_instances, **settings):
    return RandomMultipleGallery(pids, None, num_instances, **settings)


def split_groups(stream, pids):
    """Cut a pass where the identity changes; each identity is visited once, so no two neighbours are equal."""
    stream = np.asarray(stream)
    return np.split(stream, np.flatnonzero(np.diff(pids[stream])) + 1)


class Tally:
    """Mean and variance over passes, so that two sampled frequencies can be compared."""

    def __init__(self, values):
        values = np.asarray(values, float)
        self.mean, self.variance, self.passes = values.mean(0), values.var(0), len(values)

    def check(self, golden, what):
        """Two independent estimates of one frequency differ by less than 5 standard errors of their difference."""
        # A frequency that never varied here may still vary with probability below 5 / passes.
        error = 5 * np.sqrt(2 * np.maximum(self.variance, 1 / self.passes) / self.passes)
        worst = np.nanargmax(np.abs(self.mean - golden) - error)
        assert abs(self.mean.flat[worst] - golden.flat[worst]) <= error.flat[worst], (what, worst)


@pytest.mark.parametrize("case", ["sampler_ids24_k16", "sampler_ids48_k4"])
@pytest.mark.parametrize("published", SAMPLERS)
def test_matches_published_frequencies(golden, case, published):
    stored = golden(case)
    pids, cams, params = stored["pids"], stored["cams"], stored.meta["params"]
    passes, k = params["passes"], params["num_instances"]
    sampler = SAMPLERS[published](pids, cams, k, seed=3)
    ids = stored[f"{published}__ids"]

    selected = np.zeros((passes, len(pids)))
    first = np.zeros((passes, len(pids)))
    lengths = np.zeros((passes, len(ids)), int)
    repeat, anchor_again, same_camera, cameras = (np.full((passes, len(ids)), np.nan) for _ in range(4))
    for p in range(passes):
        groups = split_groups(list(sampler), pids)
        assert sorted(pids[group[0]] for group in groups) == ids.tolist()  # every identity once, no negative label
        for group in groups:
            i = pids[group[0]]
            np.add.at(selected[p], group, 1)
            first[p, group[0]] = 1
            lengths[p, i] = len(group)
            repeat[p, i] = len(set(group)) < len(group)
            anchor_again[p, i] = group[0] in group[1:]
            if len(group) > 1:
                same_camera[p, i] = (cams[group[1:]] == cams[group[0]]).mean()
            cameras[p, i] = len(set(cams[group]))

    assert np.array_equal(lengths.min(0), stored[f"{published}__group_len_min"])
    assert np.array_equal(lengths.max(0), stored[f"{published}__group_len_max"])
    kept = stored["kept_index"] if len(stored[f"{published}__selected"]) < len(pids) else slice(None)
    Tally(selected[:, kept]).check(stored[f"{published}__selected"] / passes, "images selected")
    Tally(repeat).check(stored[f"{published}__rate_group_has_repeat"], "group has a repeated image")
    Tally(cameras).check(stored[f"{published}__mean_cameras_in_group"], "cameras in a group")
    if published != "ice_MoreCameraSampler":  # its order inside a group follows Python's hashing of camera numbers
        Tally(first[:, kept]).check(stored[f"{published}__first_in_group"] / passes, "first of its group")
        Tally(anchor_again).check(stored[f"{published}__rate_anchor_repeated"], "anchor repeated")
        Tally(same_camera).check(stored[f"{published}__rate_other_in_anchor_camera"], "mate in the anchor's camera")


def test_mates_come_from_other_cameras_if_there_are_any():
    pids = np.repeat([0, 1], 6)
    cams = np.array([0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 4, 4])  # identity 1 has one camera only
    sampler = RandomMultipleGallery(pids, cams, 3)
    for _ in range(50):
        for group in split_groups(list(sampler), pids):
            others = cams[group[1:]] != cams[group[0]]
            assert others.all() if pids[group[0]] == 0 else not others.any()
            assert group[0] not in group[1:]


@pytest.mark.parametrize(("candidates", "repeats"), [(3, True), (4, False), (5, False)])
def test_replacement_starts_below_k_candidates(candidates, repeats):
    """K - 1 = 3 mates could be drawn from 3 candidates without replacement; the published rule asks for K = 4."""
    pids = np.zeros(1 + candidates, int)
    cams = np.array([0] + [1] * candidates)
    sampler = RandomMultipleGallery(pids, cams, 4, seed=1)
    seen = False
    for _ in range(100):
        group = list(sampler)
        if group[0] == 0:  # the anchor whose candidates are all the others
            seen |= len(set(group)) < 4
    assert seen == repeats


def test_single_image_identity():
    assert list(no_cam([5, -1], 4)) == [0]
    assert list(RandomMultipleGallery([7], [0], 4)) == [0]
    for sampler in (ClassUniformly([7], 4), MoreCamera([7], [0], 4)):
        assert list(sampler) == [0] * 4


def test_num_instances_one():
    assert sorted(no_cam([0, 0, 1], 1, seed=2))[-1] == 2
    assert len(list(RandomMultipleGallery([0, 0, 1], [0, 1, 0], 1))) == 2


def test_seed_and_epoch_decide_the_stream_and_the_global_generator_does_not():
    pids, cams = np.repeat(np.arange(20), 5), np.tile(np.arange(5), 20)

    def stream(seed, epoch):
        return list(RandomMultipleGallery(pids, cams, 4, seed=seed, epoch=epoch))

    np.random.seed(0)  # noqa: NPY002 - to show that it has no effect
    first = stream(1, 2)
    np.random.seed(1)  # noqa: NPY002
    assert stream(1, 2) == first
    assert stream(1, 3) != first
    assert stream(2, 2) != first
    sampler = RandomMultipleGallery(pids, cams, 4, seed=1, epoch=2)
    assert list(sampler) == first
    assert list(sampler) != first  # the next pass


def test_no_labels_at_all():
    assert list(no_cam([-1, -1], 4)) == []
    with pytest.raises(ValueError, match="at least one identity, got none"):
        iterations(no_cam([-1, -1], 4), 2, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: no_cam([[0]], 4), r"labels must be \(N,\) integers"),
        (lambda: no_cam([0.5], 4), r"labels must be \(N,\) integers"),
        (lambda: no_cam([0], 0), "num_instances must be positive, got 0"),
        (lambda: RandomMultipleGallery([0, 0], [0], 2), "camids must have one entry per label"),
        (lambda: MoreCamera([0, 0], [0, 1, 2], 2), "camids must have one entry per label"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestIterations:
    def test_restarts_where_no_batch_is_left(self):
        """10 identities x 4 = 40 images a pass: two batches of 16 each, 8 images dropped, then a new pass."""
        pids = np.repeat(np.arange(10), 4)
        sampler, twin = no_cam(pids, 4, seed=5), no_cam(pids, 4, seed=5)
        stream = list(chain(*iterations(sampler, 5, 16)))
        passes = [list(twin) for _ in range(3)]
        assert stream == passes[0][:32] + passes[1][:32] + passes[2][:16]

    def test_exact_fit_uses_the_whole_pass(self):
        pids = np.repeat(np.arange(4), 4)
        twin = no_cam(pids, 4, seed=5)
        assert iterations(no_cam(pids, 4, seed=5), 2, 16) == [list(twin), list(twin)]

    def test_too_few_identities_repeat_with_one_warning(self):
        pids = np.repeat(np.arange(3), 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for epoch in range(3):
                batches = iterations(no_cam(pids, 4, epoch=epoch), 4, 16)
                assert len(batches) == 4
                for batch in np.reshape(batches, (4, 16)):
                    assert set(pids[batch]) == {0, 1, 2}
        assert len(caught) == 1
        assert "batch of 16" in str(caught[0].message)

    @pytest.mark.parametrize(("identities", "sizes"), [(0, []), (1, [4]), (4, [16]), (7, [16]), (10, [16, 16])])
    def test_one_pass_leaves_out_a_last_batch_that_is_not_full(self, identities, sizes):
        pids = np.repeat(np.arange(identities), 4)
        batches = iterations(no_cam(pids, 4, seed=5), None, 16)
        assert [len(batch) for batch in batches] == sizes
        assert list(chain(*batches)) == list(no_cam(pids, 4, seed=5))[: sum(sizes)]

    def test_the_first_batches_of_an_epoch_do_not_depend_on_how_many_follow(self):
        pids = np.repeat(np.arange(10), 4)
        assert iterations(no_cam(pids, 4), 3, 16) == iterations(no_cam(pids, 4), 8, 16)[:3]
        assert iterations(no_cam(pids, 4), 0, 16) == []

    def test_a_lone_identity(self):
        with pytest.warns(RuntimeWarning, match="identities repeat"):
            assert iterations(no_cam([-1, 3], 4), 2, 3) == [[1] * 3] * 2

    def test_singletons_shift_the_groups_but_batches_stay_full(self):
        pids = np.r_[np.repeat(np.arange(4), 4), 4, 5, 6]
        assert [len(batch) for batch in iterations(no_cam(pids, 4, seed=1), 7, 8)] == 7 * [8]


@pytest.mark.parametrize("instances", [1, 2, 3, 16])
@pytest.mark.parametrize("sampler", [RandomMultipleGallery, no_cam, ClassUniformly, MoreCamera])
def test_len_is_that_of_every_pass(sampler, instances):
    rng = np.random.default_rng(instances)
    pids, cams = rng.integers(-1, 12, 60), rng.integers(0, 3, 60)
    pids[:3] = (20, 21, 21)  # people of one image and of two
    cameras = () if sampler in (no_cam, ClassUniformly) else (cams,)
    made = sampler(pids, *cameras, num_instances=instances, seed=np.int64(3))
    assert [sum(1 for _ in made) for _ in range(3)] == [len(made)] * 3
    assert len(sampler(np.full(60, -1), *cameras, num_instances=instances)) == 0
