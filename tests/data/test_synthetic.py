# SPDX-License-Identifier: Apache-2.0
"""Rendered pedestrians: the files, the cache, what can go wrong, and that each dial does what it says."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_u.data import load_dataset
from fastreid_u.data.synthetic import SyntheticConfig, generate
from fastreid_u.data.synthetic import write as writer
from fastreid_u.data.synthetic.__main__ import contact_sheet, main
from fastreid_u.data.synthetic.body import Pose, make_body
from fastreid_u.data.synthetic.camera import develop
from fastreid_u.data.synthetic.identity import make_person
from fastreid_u.data.synthetic.render import Shot, World
from fastreid_u.data.synthetic.shading import View, project, rasterise
from fastreid_u.data.synthetic.write import make_plan

SPLITS = ("bounding_box_train", "query", "bounding_box_test")
TINY = SyntheticConfig(train_ids=2, test_ids=2, cameras=2, images_per_camera=2, distractors=1, seed=100)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(TINY, tmp_path_factory.mktemp("synthetic"), workers=1)


@cache
def world(**dials: float) -> World:
    return World(SyntheticConfig(cameras=2, seed=100, **dials))


def pixels(world: World, shot: Shot) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(world.shoot(shot))), dtype=float)


# ---- files


def test_layout_and_names(tiny: Path) -> None:
    assert sorted(p.name for p in tiny.iterdir()) == sorted([*SPLITS, "synthetic.json"])
    people: dict[str, set] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for file in (tiny / split).iterdir():
            match = re.fullmatch(r"(\d{4})_c([12])s1_\d{6}_\d\d\.jpg", file.name)
            assert match, file.name
            people[split].add(int(match[1]))
            with Image.open(file) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))
    assert people == {"bounding_box_train": {1, 2}, "query": {3, 4}, "bounding_box_test": {0, 3, 4}}


def test_description_counts_what_is_there(tiny: Path) -> None:
    told = json.loads((tiny / "synthetic.json").read_text())
    assert told["images"] == {split: len(list((tiny / split).iterdir())) for split in SPLITS}
    assert SyntheticConfig(**told["dials"]) == TINY


def test_one_query_per_person_and_camera() -> None:
    config = SyntheticConfig(train_ids=3, test_ids=20, camera_presence=0.5)
    queries, rest = {}, {}
    for name, _ in make_plan(config):
        split, file = name.split("/")
        if split != "bounding_box_train":
            counts = queries if split == "query" else rest
            counts[file[:7]] = counts.get(file[:7], 0) + 1
    assert set(queries.values()) == {1}
    assert {key: n for key, n in rest.items() if not key.startswith("0000")} == dict.fromkeys(queries, 3)


def test_the_ordinary_reader_reads_it(tiny: Path) -> None:
    dataset = load_dataset(tiny)
    assert len(dataset.train) == 8
    assert len(dataset.query) == 4
    assert len(dataset.gallery) == 8
    assert dataset.num_cameras == 2
    assert {sample.pid for sample in dataset.query}.isdisjoint(sample.pid for sample in dataset.train)


@pytest.mark.parametrize(("presence", "low", "high"), [(0.0, 2, 2), (1.0, 6, 6), (0.5, 2, 6)])
def test_camera_presence(presence: float, low: int, high: int) -> None:
    cameras: dict[int, set[int]] = {}
    for _, shot in make_plan(SyntheticConfig(camera_presence=presence)):
        cameras.setdefault(shot.person, set()).add(shot.camera)
    counts = [len(c) for c in cameras.values()]
    assert (min(counts), max(counts)) == (low, high)
    assert len({frozenset(c) for c in cameras.values()}) > 5 or presence == 1.0  # not the same cameras for all


# ---- determinism and cache


def test_bytes_do_not_depend_on_workers(tiny: Path, tmp_path: Path) -> None:
    seen = []
    other = generate(TINY, tmp_path, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert digests(other) == digests(tiny)
    assert seen[-1] == (20, 20)


def test_another_seed_is_another_world(tiny: Path, tmp_path: Path) -> None:
    other = generate(replace(TINY, seed=101), tmp_path, workers=1)
    assert other.name != tiny.name
    assert set(digests(other).values()).isdisjoint(digests(tiny).values())


def test_second_call_renders_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "render_share", None)
    assert generate(TINY, tiny.parent, progress=pytest.fail) == tiny


def test_folder_without_its_marker_is_made_anew(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / tiny.name
    (half / "query").mkdir(parents=True)
    (half / "query" / "0001_c1s1_000001_00.jpg").write_bytes(b"half")
    assert digests(generate(TINY, tmp_path, workers=1)) == digests(tiny)


@pytest.mark.parametrize("damage", ["half is gone", "one is empty", "a folder is gone", "the counts are gone"])
def test_a_set_that_is_no_longer_whole_is_made_anew(tiny: Path, tmp_path: Path, damage: str) -> None:
    """Else a part of it would be trained on without a word."""
    held = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    files = sorted(held.rglob("*.jpg"))
    if damage == "half is gone":
        for path in files[::2]:
            path.unlink()
    elif damage == "one is empty":
        files[0].write_bytes(b"")
    elif damage == "the counts are gone":
        (held / "synthetic.json").write_text("{}")
    else:
        shutil.rmtree(held / "query")
    assert digests(generate(TINY, tmp_path, workers=1)) == digests(tiny)


def test_images_that_were_not_rendered_are_refused(tiny: Path, tmp_path: Path) -> None:
    held = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    (held / "bounding_box_train" / ".DS_Store").touch()
    assert generate(TINY, tmp_path) == held
    (held / "bounding_box_train" / "9999_c1_mine.jpg").touch()
    with pytest.raises(
        ValueError, match=r"must hold the rendered images alone, got 1 others: bounding_box_train/9999_c1"
    ):
        generate(TINY, tmp_path)


def test_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREID_U_CACHE", str(tmp_path / "cache"))
    config = replace(TINY, train_ids=0, test_ids=1, distractors=0)
    assert generate(config, workers=1).parent == tmp_path / "cache"


@pytest.mark.parametrize("dial", [{"seed": 1}, {"shift": 0.3}, {"train_ids": 3}, {"width": 72}])
def test_dials_are_part_of_the_key(dial: dict) -> None:
    assert replace(TINY, **dial).digest() != TINY.digest() == replace(TINY).digest()


# ---- errors


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"train_ids": -1}, "synthetic: train_ids must be 0 or more, got -1"),
        ({"train_ids": 0, "test_ids": 0}, "train_ids \\+ test_ids must be 1 or more"),
        ({"train_ids": 9999}, "must be 9999 or less"),
        ({"cameras": 1}, "cameras must be 2 or more"),
        ({"cameras": 10}, "cameras must be 9 or less"),
        ({"images_per_camera": 1}, "images_per_camera must be 2 or more"),
        ({"camera_presence": 1.5}, "camera_presence must lie in \\[0, 1\\], got 1.5"),
        ({"occlusion": float("nan")}, "occlusion must lie in \\[0, 1\\], got nan"),
        ({"shift": -0.1}, "shift must lie in \\[0, 4\\], got -0.1"),
        ({"palette": 0}, "palette must lie in \\[1, 16\\], got 0"),
        ({"height": 100}, "height must be a multiple of 8"),
        ({"height": 128, "width": 128}, "height / width must lie in"),
    ],
)
def test_dials_out_of_range(dials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**dials)


@pytest.mark.parametrize("dials", [{"seed": 1.5}, {"palette": "16"}, {"shift": "0.2"}, {"train_ids": True}])
def test_dials_of_the_wrong_type(dials: dict) -> None:
    with pytest.raises(TypeError, match=f"synthetic: {next(iter(dials))} must be"):
        SyntheticConfig(**dials)


def test_workers_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generate: workers must be 1 or more, got 0"):
        generate(TINY, tmp_path, workers=0)


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the rendered data set") as caught:
        generate(TINY, tmp_path / "file", workers=1)
    assert caught.value.filename == str(tmp_path / "file")


def test_a_full_disk_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device.*{tmp_path}"):
        generate(TINY, tmp_path, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_no_debris(tmp_path: Path, workers: int) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(TINY, tmp_path, workers=workers, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_hands_its_error_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = {"config": {**TINY.__dict__}, "folder": str(tmp_path / "absent"), "start": 0, "step": 2}
    status = writer.work(json.dumps(job))
    with pytest.raises(FileNotFoundError):
        writer._report(status, capfd.readouterr().err)


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """A folder that another process renders into is locked by it for as long as it lives."""
    tiny = SyntheticConfig(train_ids=1, test_ids=0, cameras=2, images_per_camera=2, distractors=0, height=64, width=32)
    left, others, used = (
        tmp_path / ".synthetic-0123456789ab-k_7lled0",
        [tmp_path / ".synthetic-notes", tmp_path / ".synthetic-0123456789ab-long_name0", tmp_path / "synthetic-mine"],
        tmp_path / ".synthetic-0123456789ab-in_use_0",
    )
    for folder in (left, *others, used):
        (folder / "query").mkdir(parents=True)
    program = (
        "import fcntl, os, sys\nfcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('mine', flush=True)\nsys.stdin.read()"
    )
    pytest.importorskip("fcntl")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "mine\n"
        final = generate(tiny, tmp_path, workers=1)
        other.stdin.close()
    assert set(tmp_path.iterdir()) == {final, used, *others}
    assert generate(replace(tiny, seed=5), tmp_path, workers=1).is_dir()
    assert not used.exists(), "its process has ended"


def test_a_killed_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a rendering process ended with status 1"):
        generate(TINY, tmp_path, workers=2)
    assert list(tmp_path.iterdir()) == []


def test_import_is_light() -> None:
    code = "import sys, fastreid_u.data.synthetic as s; s.SyntheticConfig; print({'torch', 'numba'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"


# ---- bodies


def test_soles_touch_the_ground_in_every_phase() -> None:
    person = make_person(np.random.default_rng(7))
    for phase in np.linspace(0, 2 * np.pi, 9):
        body = make_body(person, Pose(phase=float(phase)))
        shoes = [i for i, fabric in enumerate(body.fabric) if fabric == "shoes"]
        assert abs(body.ends[shoes, :, 1].min() - 0.018 * person.stature) < 1e-9
        assert 0.9 * person.stature < body.ends[..., 1].max() < 1.05 * person.stature


@pytest.mark.parametrize(("yaw", "front"), [(0.0, 1), (np.pi, -1)])
def test_yaw_zero_shows_the_front(yaw: float, front: int) -> None:
    person = make_person(np.random.default_rng(7))
    body, view = make_body(person, Pose(phase=1.0)), View(yaw, 0.1, 8.0)
    surface = rasterise(body, project(body, view, person.stature).placed(120, 64, 128), view, (256, 128), 120.0)
    trunk = np.isin(surface.part, [i for i, fabric in enumerate(body.fabric) if fabric == "top"])
    assert front * surface.lz[trunk].mean() > 0.4
    left = surface.lx[trunk][surface.seen.nonzero()[1][trunk] > surface.seen.shape[1] / 2]
    assert front * left.mean() > 0  # facing the camera, the person's left is on the right of the picture


def test_nearer_tube_wins() -> None:
    person = replace(make_person(np.random.default_rng(7)), bag="backpack")
    body = make_body(person, Pose(phase=1.0))
    bag, share = body.fabric.index("bag"), []
    for yaw in (0.0, np.pi):
        view = View(yaw, 0.1, 8.0)
        surface = rasterise(body, project(body, view, person.stature).placed(120, 64, 128), view, (256, 128), 120.0)
        share.append((surface.part == bag).mean())
    assert share[0] < 0.02 < 0.1 < share[1]


# ---- dials


def test_small_palette_brings_clothes_closer() -> None:
    def spread(palette: int) -> float:
        people = [make_person(np.random.default_rng((5, i)), palette, 0.0) for i in range(60)]
        colours = np.array([(p.fabrics["top"].colour, p.fabrics["bottom"].colour) for p in people])
        return float(np.linalg.norm(colours[:, None] - colours[None], axis=-1).mean())

    assert spread(2) < 0.75 * spread(16)
    assert spread(1) < 0.25 * spread(16)


def test_small_palette_brings_pictures_closer() -> None:
    def spread(palette: int) -> float:
        here = world(palette=palette, shift=0.0, texture=0.0, occlusion=0.0, jitter=0.0, yaw_std=0.0)
        people = [pixels(here, Shot(i, 0, 0))[30:100, 22:42] for i in range(12)]
        histograms = np.array([np.histogramdd(p.reshape(-1, 3), 4, [(0, 256)] * 3)[0].ravel() for p in people])
        return float(np.abs(histograms[:, None] - histograms[None]).mean())

    assert spread(1) < 0.8 * spread(16)


@pytest.mark.parametrize(("texture", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_texture_is_the_share_of_patterned_tops(texture: float, share: float) -> None:
    people = [make_person(np.random.default_rng((5, i)), 16, texture) for i in range(20)]
    assert np.mean([p.fabrics["top"].pattern != "plain" for p in people]) == share


def test_texture_changes_nothing_else() -> None:
    plain, patterned = (make_person(np.random.default_rng(11), 16, texture) for texture in (0.0, 1.0))
    bare = [
        replace(p, fabrics={k: replace(f, pattern="plain") for k, f in p.fabrics.items()}) for p in (plain, patterned)
    ]
    assert bare[0] == bare[1]


def test_shift_moves_the_cameras_colours_apart() -> None:
    scene = np.random.default_rng(0).uniform(0.05, 0.5, (128, 64, 3)).astype(np.float32)

    def distance(shift: float) -> float:
        means = []
        for camera in World(SyntheticConfig(cameras=9, seed=100, shift=shift)).cameras:
            picture = Image.open(io.BytesIO(develop(camera, scene, np.random.default_rng(1))))
            means.append(np.asarray(picture, dtype=float).mean((0, 1)))
        return float(np.linalg.norm(np.subtract.outer(means, means).diagonal(axis1=1, axis2=3), axis=-1).mean())

    assert distance(0.0) < 3
    assert 2 * distance(0.0) < distance(0.2) < 0.5 * distance(0.8)


def test_occlusion_changes_pixels_of_its_share_of_the_pictures() -> None:
    shots = [Shot(i, 0, 0) for i in range(16)]
    open_, half, full = (world(occlusion=o) for o in (0.0, 0.5, 1.0))
    clear = [pixels(open_, s) for s in shots]
    changed = [
        [(np.abs(pixels(w, s) - c).max(-1) > 25).mean() for s, c in zip(shots, clear, strict=True)]
        for w in (half, full)
    ]
    assert np.mean(changed[0]) < np.mean(changed[1])
    touched = [np.mean([c > 0 for c in row]) for row in changed]
    assert 0.2 < touched[0] < 0.8
    assert touched[1] > 0.9
    assert max(changed[1]) < 0.7  # somebody is still to be seen
    assert [c for c in changed[0] if c] == [b for a, b in zip(*changed, strict=True) if a]  # the same things


def test_jitter_moves_the_box() -> None:
    def spread(jitter: float) -> float:
        here = world(jitter=jitter, occlusion=0.0, yaw_std=0.0, shift=0.0)
        other = world(jitter=0.0, occlusion=0.0, yaw_std=0.0, shift=0.0)
        return float(
            np.mean([np.abs(pixels(here, Shot(i, 0, 0)) - pixels(other, Shot(i, 0, 0))).mean() for i in range(4)])
        )

    assert spread(0.0) == 0
    assert 2 < spread(0.5) < spread(2.0)


def test_background_mix_takes_other_cameras() -> None:
    own, mixed = world(background_mix=0.0, occlusion=0.0), world(background_mix=1.0, occlusion=0.0)
    change = [np.abs(pixels(own, Shot(i, 0, 0)) - pixels(mixed, Shot(i, 0, 0))).max(-1) > 30 for i in range(8)]
    share = np.array([c.mean() for c in change])
    assert 0.1 < (share > 0.05).mean() < 0.95  # of two cameras, half the draws name the own one
    assert share.max() < 0.9


def test_yaw_std_turns_people() -> None:
    still = world(yaw_std=0.0, occlusion=0.0)
    turned = world(yaw_std=1.5, occlusion=0.0)
    assert np.mean([np.abs(pixels(still, Shot(i, 0, 0)) - pixels(turned, Shot(i, 0, 0))).mean() for i in range(4)]) > 3


def test_intruders_are_their_share_of_training_only() -> None:
    plan = make_plan(SyntheticConfig(intruders=0.3, test_ids=8))
    wrong = [name for name, shot in plan if shot.intruder]
    train = [name for name, _ in plan if name.startswith("bounding_box_train")]
    assert set(wrong) < set(train)
    assert abs(len(wrong) / len(train) - 0.3) < 0.05
    assert {shot.intruder for _, shot in plan} == {"", "empty", "stranger", "badbox"}
    assert not any(shot.intruder for _, shot in make_plan(SyntheticConfig()))
    names = [[name for name, _ in make_plan(SyntheticConfig(intruders=i))] for i in (0.0, 0.3)]
    assert names[0] == names[1]


def test_what_intruders_show() -> None:
    here = world(occlusion=0.0)
    usual, empty, stranger, badbox = (pixels(here, Shot(0, 0, 0, kind)) for kind in ("", "empty", "stranger", "badbox"))
    middle = np.s_[40:90, 28:36]
    for picture in (empty, stranger, badbox):
        assert np.abs(picture - usual)[middle].mean() > 10
    assert np.abs(empty - usual)[:10, :5].mean() < 5  # the same place, without the person


def test_size_is_a_dial() -> None:
    assert pixels(world(height=256, width=128), Shot(0, 0, 0)).shape == (256, 128, 3)


# ---- command


def test_contact_sheet() -> None:
    sheet = contact_sheet(TINY, people=2, per_camera=1)
    assert sheet.size == (2 * 70 - 4, 2 * 130)
    assert np.asarray(sheet).std() > 20


def test_command_writes_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sheet.jpg"
    assert main(["--sheet", str(target), "--people", "1", "--cameras", "2"]) == 0
    assert Image.open(target).format == "JPEG"
    assert capsys.readouterr().out.strip() == str(target)
