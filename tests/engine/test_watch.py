# SPDX-License-Identifier: Apache-2.0
"""Labels that training cannot learn from are warned of, once for each cause; those of healthy runs are not."""

import numpy as np
import pytest
import torch

from fastreid_u.config import Config
from fastreid_u.engine.health import label_health
from fastreid_u.engine.watch import LabelWatch
from fastreid_u.images import Images
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.labels.infomap import InfomapLabels
from fastreid_u.recipes import get_method


def sizes_as_labels(*sizes, unclustered=0):
    return np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(unclustered, -1)])


def watch(images, generator=DBSCANLabels, **options):
    return LabelWatch(images, generator(Config(), Images(images)), **options)


def looked(labels_of_epochs, **options):
    """The lines of each epoch."""
    before, lines = None, []
    watching = watch(len(labels_of_epochs[0]), **options)
    for epoch, labels in enumerate(labels_of_epochs):
        lines.append(watching.look({"epoch": epoch, **label_health(labels, before, None)}))
        before = labels
    return lines


def counted(images, clusters, unclustered, largest, agreement):
    """The lines of a run whose counts were noted."""
    watching = watch(images)
    rows = zip(clusters, unclustered, largest, agreement, strict=True)
    names = ("clusters", "unclustered", "largest", "agreement")
    return [watching.look({"epoch": e, **dict(zip(names, row, strict=True))}) for e, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (sizes_as_labels(238, 20, 12, 10, unclustered=20), "the largest of 4 clusters holds 79% of the images"),
        (sizes_as_labels(185, 20, 15, 10, 5, unclustered=5), "the largest of 5 clusters holds 77% of the images"),
        (sizes_as_labels(137, 8, 8), "the largest of 3 clusters holds 90% of the images"),
        (sizes_as_labels(426, *[20] * 36, unclustered=293), "the largest of 37 clusters holds 30% of the images"),
        (sizes_as_labels(95, 5), "the largest of 2 clusters holds 95% of the images"),
    ],
)
def test_most_images_in_one_cluster_is_warned_of_at_once_with_what_to_do(labels, text):
    ((line,),) = looked([labels])
    assert line.startswith(f"warning: epoch 0: {text}")
    assert "k1 to about the number of images that a person has" in line
    assert "(now eps 0.6, min_samples 4, k1 30)" in line
    assert "center_per_camera" not in line
    assert "center_per_camera=True" in looked([labels], uncentred=True)[0][0]


@pytest.mark.parametrize(
    "sizes",
    [(191, 150, 130, 120, *[60] * 12, 28, 28, 28), (40, 30), (30, 20, 18), (20, 12, 10, 9, 8), (60, 56, 50, 20, 10, 9)],
)
def test_people_of_uneven_numbers_of_images_are_not_warned_of(sizes):
    """Few people have large clusters: 19 tracks of 28 to 191 crops, and sets of two to six people."""
    assert looked([sizes_as_labels(*sizes)] * 4) == [[], [], [], []]


def test_a_warning_comes_once_and_again_where_it_is_much_worse():
    def blob(size):
        return sizes_as_labels(size, *[5] * ((1000 - size) // 5))

    lines = looked([blob(250), blob(260), blob(300), blob(400), blob(410), blob(250), blob(700)])
    assert [len(line) for line in lines] == [1, 0, 0, 1, 0, 0, 1]


def test_one_cluster_is_warned_of_once():
    lines = looked([sizes_as_labels(50, unclustered=10)] * 3)
    assert [len(line) for line in lines] == [1, 0, 0]
    assert "one cluster holds all clustered images" in lines[0][0]


def test_a_run_that_collapses_under_the_default_settings_is_warned_of():
    """First and last counts as measured on 1,439 crops of 150 people, those between drawn straight."""
    lines = counted(
        1439, [51, 40, 35, 33, 31, 30], [0.43, 0.38, 0.33, 0.29, 0.24, 0.20], [191, 240, 290, 330, 380, 426],
        [None, 0.13, 0.18, 0.22, 0.27, 0.31],
    )  # fmt: skip
    text = "\n".join(line for epoch in lines for line in epoch)
    assert "epoch 2: the largest of 35 clusters holds 20% of the images" in text
    assert "epoch 3: labels are made almost anew in each epoch (they agree with the ones before by 0.13, 0.18" in text
    assert text.count("warning") == 2


def test_clusters_that_run_together_are_warned_of_before_one_of_them_is_large():
    lines = counted(1000, [50, 44, 36, 34], [0.2] * 4, [70, 90, 130, 140], [None, 0.6, 0.6, 0.6])
    assert [len(line) for line in lines] == [0, 0, 1, 0]
    assert "clusters run together: 36 are left of 50, and the largest has grown from 70 to 130 images" in lines[2][0]


@pytest.mark.parametrize(
    "run",
    [
        # cluster_contrast on a rendered world, random weights, centred: mAP 4 to 80 %
        (1188, [6, 40, 45, 48, 50], [0.622, 0.516, 0.342, 0.178, 0.092], [215, 92, 102, 92, 63],
         [None, 0.09, 0.20, 0.38, 0.63]),
        # the same method on PETS (19 tracks of 28 to 191 crops), ImageNet weights, mAP 37 to 51 %: first clusters,
        # first and last agreement as measured, the rest in keeping
        (1494, [16, 17, 17, 18, 18], [0.2, 0.15, 0.1, 0.08, 0.06], [240, 230, 220, 210, 200],
         [None, 0.41, 0.62, 0.8, 0.92]),
        # many identities that are split at first and put together later
        (12936, [1100, 900, 760, 720], [0.55, 0.35, 0.22, 0.18], [80, 140, 150, 160], [None, 0.4, 0.6, 0.8]),
        # CAP with small k1 on 1,439 crops, same-view mAP 40 to 58 %: un-clustered and last clusters as measured
        (1439, [278, 280, 275, 278], [0.32, 0.2, 0.1, 0.07], [30, 31, 31, 31], [None, 0.3, 0.5, 0.6]),
    ],
    ids=["rendered", "pets", "large", "cap"],
)  # fmt: skip
def test_a_healthy_run_is_not_warned_of(run):
    lines = [line for epoch in counted(*run) for line in epoch]
    assert not [line for line in lines if line.startswith("warning")]
    assert len(lines) <= 1, "a note on the first labels at most"


def test_many_unclustered_images_are_a_note_in_the_first_labels_and_a_warning_if_they_stay():
    falling = counted(1000, [40] * 3, [0.7, 0.55, 0.4], [20] * 3, [None, 0.5, 0.5])
    assert [[line.split(":")[0] for line in epoch] for epoch in falling] == [["note"], [], []]
    staying = counted(1000, [40] * 4, [0.57, 0.58, 0.60, 0.63], [20] * 4, [None, 0.5, 0.5, 0.5])
    assert [[line.split(":")[0] for line in epoch] for epoch in staying] == [["note"], ["warning"], [], []]
    assert "58% of the images are un-clustered, after 57% in the epoch before. Raise eps" in staying[1][0]
    worse = counted(1000, [40] * 3, [0.71, 0.91, 0.77], [20] * 3, [None, 0.5, 0.5])
    assert [len(epoch) for epoch in worse] == [1, 1, 0]


def test_a_first_label_set_that_a_fixed_threshold_throws_away_is_warned_of_with_the_option():
    """Infomap on PETS: 0.5 % un-clustered at first, 75 % one epoch later, when similarities have dropped."""
    labels = InfomapLabels(get_method("cluster_contrast_infomap").Config(), Images(1494))
    watching = LabelWatch(1494, labels)
    counts = {"clusters": 30, "largest": 100, "agreement": None}
    assert watching.look({"epoch": 0, **counts, "unclustered": 0.005}) == []
    (line,) = watching.look({"epoch": 1, **counts, "unclustered": 0.75})
    assert line.startswith("warning: epoch 1: the share of un-clustered images rose from 0.5% to 75.0% within one")
    assert "Lower min_similarity" in line
    assert "min_similarity 0.5" in line


def test_a_resumed_run_does_not_repeat_the_warnings_of_the_first_part():
    labels = sizes_as_labels(238, 20, 12, 10, unclustered=20)
    record = label_health(labels, None, None)
    again = watch(len(labels), before=[{"epoch": -1, "mAP": 0.1}, {"epoch": 0, "loss": 1.0}, {"epoch": 0, **record}])
    assert again.look({"epoch": 1, **record}) == []


def test_a_run_shows_and_logs_its_warnings_before_it_trains(smoke, monkeypatch):
    """300 crops of few images a person collapse under k1 30; here 72 images with the labels of such a run."""
    monkeypatch.setattr("fastreid_u.engine.loop.draw_curves", lambda *_, **__: None)
    blob = torch.from_numpy(sizes_as_labels(57, 5, 5, unclustered=5))
    monkeypatch.setattr(DBSCANLabels, "cluster", lambda self, features, epoch: blob)
    monkeypatch.setattr("fastreid_u.engine.loop.fit_epoch", lambda s, epoch, targets: 1.0)
    run = smoke("cluster_contrast", epochs=3, eval_step=9, k1=30)
    lines = (run.folder / "log.txt").read_text().splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("warning: epoch 0: the largest of 3")]
    (row,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["0", "3"]]
    assert place < row
    assert not [line for line in lines if line.startswith(("warning: epoch 1", "warning: epoch 2"))]
    assert any(line.startswith("  scale       k1 30, 72 images: fits people of about 30 images") for line in lines)
