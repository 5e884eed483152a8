# SPDX-License-Identifier: Apache-2.0
"""The plan of a data set, and its files in the layout and naming of Market-1501."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastreid_u.data.locate import list_images, shown
from fastreid_u.data.synthetic.config import RENDERER, SyntheticConfig
from fastreid_u.data.synthetic.render import Shot, World
from fastreid_u.data.synthetic.scratch import scratch_folder

Plan = list[tuple[str, Shot]]  # path inside the folder, what it shows

_IO_ERROR = 74  # exit status of a worker that could not write (EX_IOERR, which Windows lacks)
_PLAN = 100  # random stream of the plan, apart from those of the renderer


def make_plan(config: SyntheticConfig) -> Plan:
    """Every file of the set: who passes which camera, and which crop is the query."""
    rng = np.random.default_rng((config.seed, _PLAN))
    plan, frame = [], 0
    people = config.train_ids + config.test_ids + config.distractors
    for number in range(people):
        rank = rng.permutation(config.cameras)
        passes = rng.random(config.cameras) < config.camera_presence
        for spare in rank.tolist():
            passes[spare] |= passes.sum() < 2
        pid = number + 1 if number < config.train_ids + config.test_ids else 0
        for camera in np.flatnonzero(passes).tolist():
            query = int(rng.integers(config.images_per_camera))
            for take in range(config.images_per_camera):
                wrong, kind = rng.random() < config.intruders, ("empty", "stranger", "badbox")[int(rng.integers(3))]
                frame += 1
                if number < config.train_ids:
                    folder = "bounding_box_train"
                elif pid and take == query:
                    folder = "query"
                else:
                    folder = "bounding_box_test"
                name = f"{folder}/{pid:04d}_c{camera + 1}s1_{frame:06d}_00.jpg"
                shown = kind if wrong and folder == "bounding_box_train" else ""
                plan.append((name, Shot(number, camera, take, shown)))
    return plan


def generate(
    config: SyntheticConfig | None = None,
    root: str | os.PathLike | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render the data set of ``config``, or find it rendered, and return its folder.

    The folder is ``<root>/synthetic-<digest>``, with ``bounding_box_train``, ``query``, ``bounding_box_test`` and
    ``synthetic.json`` (dials and counts). It appears under that name only when it is complete; a broken run leaves
    nothing behind, the next removes what a killed one has left, and a set of which images are gone is rendered anew.
    The bytes depend on the dials alone, not on ``workers``, as long as NumPy, Pillow and its JPEG encoder are the same.

    Args:
        config: the dials; None means ``SyntheticConfig()``.
        root: parent folder; None means ``$FASTREID_U_CACHE``, or ``~/.cache/fastreid_u`` where that is not set.
        workers: rendering processes; None means one per CPU this process may use, and one for a small set.
        progress: called as ``progress(done, total)`` every few images, in the calling thread; not on a cache hit.

    Raises:
        ValueError: ``workers`` is not positive, or the folder holds images that were not rendered.
        OSError: the folder cannot be written (no permission, disk full); the message names it.
        RuntimeError: a rendering process died.
    """
    config = SyntheticConfig() if config is None else config
    if workers is not None and workers < 1:
        raise ValueError(f"generate: workers must be 1 or more, got {workers!r}")
    root = os.environ.get("FASTREID_U_CACHE") or "~/.cache/fastreid_u" if root is None else root
    root = Path(root).expanduser()
    final = root / f"synthetic-{config.digest()}"
    try:
        if _is_whole(config, final):
            return final
    except OSError as error:
        raise _unwritable(root, error) from error
    plan = make_plan(config)
    if workers is None:
        workers = max(1, min(_cpus(), len(plan) // 100))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with scratch_folder(final) as scratch:
            for folder in ("bounding_box_train", "query", "bounding_box_test"):
                (scratch / folder).mkdir()
            done = render_share(config, plan, scratch) if workers == 1 else _render_apart(config, scratch, workers)
            with contextlib.closing(done):  # before the scratch folder goes, its writers must
                for count, _ in enumerate(done, 1):
                    if progress is not None and (count % 16 == 0 or count == len(plan)):
                        progress(count, len(plan))
            (scratch / "synthetic.json").write_text(json.dumps(_describe(config, plan), indent=2) + "\n")
            _publish(scratch, final)
    except OSError as error:
        raise _unwritable(root, error) from error
    return final


def _is_whole(config: SyntheticConfig, final: Path) -> bool:
    """Whether ``final`` holds the images that its marker counts, none of them empty. If not, the marker goes.

    Raises:
        ValueError: images lie there that ``config`` does not have; they would be trained on or ranked.
    """
    marker = final / "synthetic.json"
    if not marker.is_file():
        return False
    present = [os.path.relpath(path, final).replace(os.sep, "/") for path in list_images(final, recursive=True)]
    try:
        told = json.loads(marker.read_text(encoding="utf-8"))["images"]
    except (ValueError, LookupError, TypeError):  # not as _describe writes it
        told = None
    if told == Counter(name.partition("/")[0] for name in present) and all(
        os.path.getsize(final / name) for name in present
    ):
        return True
    if more := sorted({*present} - {name for name, _ in make_plan(config)}):
        raise ValueError(
            f"generate: {shown(final)} must hold the rendered images alone, got {len(more)} others: {shown(more[0])}"
        )
    marker.unlink()
    return False


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def render_share(config: SyntheticConfig, plan: Plan, folder: Path) -> Iterator[None]:
    """Write the files of ``plan`` below ``folder``; yields after each."""
    world = World(config)
    for name, shot in plan:
        (folder / name).write_bytes(world.shoot(shot))
        yield


def _render_apart(config: SyntheticConfig, folder: Path, workers: int) -> Iterator[None]:
    """Render in fresh interpreters, not in ``multiprocessing`` ones: no fork of a threaded parent (torch is one), and
    no ``if __name__ == "__main__"`` asked of the caller's script. Each writes one byte per image into a shared pipe."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        crew = []
        try:
            for number in range(workers):
                job = json.dumps({"config": asdict(config), "folder": str(folder), "start": number, "step": workers})
                command = [sys.executable, "-m", "fastreid_u.data.synthetic", "--worker", job]
                complaint = stack.enter_context(tempfile.TemporaryFile())
                worker = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=writer, stderr=complaint, env=environment
                )
                stack.enter_context(worker)  # waits for it, after the kill of the next line
                stack.callback(worker.kill)
                crew.append((worker, complaint))
        finally:
            os.close(writer)
        while beats := os.read(reader, 4096):  # ends when the last worker does
            yield from (None for _ in beats)
        for worker, complaint in crew:
            if worker.wait():
                complaint.seek(0)
                _report(worker.returncode, complaint.read().decode(errors="replace"))


def work(job: str) -> int:
    """Body of a rendering process; ``job`` is the JSON of ``_render_apart``. Returns the exit status."""
    order = json.loads(job)
    config = SyntheticConfig(**order["config"])
    try:
        for _ in render_share(config, make_plan(config)[order["start"] :: order["step"]], Path(order["folder"])):
            os.write(1, b".")
    except OSError as error:
        print(json.dumps([error.errno, error.strerror]), file=sys.stderr)
        return _IO_ERROR
    return 0


def _report(status: int, complaint: str) -> None:
    if status == _IO_ERROR:
        raise OSError(*json.loads(complaint.strip().splitlines()[-1]))
    raise RuntimeError(f"generate: a rendering process ended with status {status}: {complaint.strip()[-2000:]}")


def _describe(config: SyntheticConfig, plan: Plan) -> dict:
    images = Counter(name.split("/")[0] for name, _ in plan)
    return {
        "what": "rendered pedestrians for trying and testing; not a Re-ID benchmark",
        "renderer": RENDERER,
        "dials": asdict(config),
        "images": dict(images),
        "intruders": sorted(name for name, shot in plan if shot.intruder),
    }


def _publish(scratch: Path, final: Path) -> None:
    scratch.chmod(0o755)  # mkdtemp's is private
    if final.is_dir() and not (final / "synthetic.json").is_file():
        shutil.rmtree(final)  # left by a deletion that was broken off
    try:
        scratch.rename(final)
    except OSError:
        if not (final / "synthetic.json").is_file():  # else somebody finished first, with the same bytes
            raise


def _unwritable(root: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"generate: cannot write the rendered data set ({error.strerror or error})", str(root))
