# SPDX-License-Identifier: Apache-2.0
"""Every command and snippet of README.md runs. A new one that this file does not know fails the test."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastreid_u
from fastreid_u.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs a source checkout around it")

# What shrinks a run to seconds without changing its path through the code.
SMALL = [
    "--height", "64", "--width", "32", "-a", "resnet10", "--weights", "None", "--bn-group", "None", "--workers", "0",
    "--iters", "2", "--epochs", "1", "-b", "16", "--num-instances", "4", "--k1", "8", "--k2", "3", "--device", "cpu",
    "--eps", "0.7",
]  # fmt: skip


def indented_commands():
    """Lines indented by four spaces up to the picture; after it stands what the demo prints."""
    opening = README.read_text().split("![")[0]
    return [line.split("#")[0].strip() for line in opening.splitlines() if re.match(r"    \S", line)]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_opens_with_the_two_commands():
    assert indented_commands()[:2] == ["make demo", "make test"]


def test_make_targets_run_what_stands_beside_them():
    """The plain commands shown are those that make would run; ``make bench`` and ``make lint`` exist."""

    def recipe(target):
        done = subprocess.run(
            ["make", "--always-make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.replace("--quiet ", "").replace("-c constraints.txt ", "").splitlines()

    plain = [command.replace(".venv/bin/python -m venv", "python3 -m venv") for command in indented_commands()[2:]]
    assert len(plain) == 4
    demo, test = recipe("demo"), recipe("test")
    assert [command for command in plain if command in demo] == plain[:3]
    assert [command for command in plain if command in test] == [plain[0], plain[1], plain[3]]
    assert any("benchmarks/on_cpu.py" in line for line in recipe("bench"))
    assert any("ruff check" in line for line in recipe("lint"))


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make [\w-]+", script, flags=re.MULTILINE) == ["make test", "make test-newest"]


@pytest.fixture
def crops(tiny_world, tiny_source, tmp_path, monkeypatch):
    """The folders that the README's commands speak of, under a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "crops").symlink_to(tiny_source / "bounding_box_train")
    rows = [
        f"{path},{path.name[:4]},{path.name[6]}" for path in sorted((tiny_world / "bounding_box_train").glob("*.jpg"))
    ]
    (tmp_path / "crops.csv").write_text("path,pid,camid\n" + "\n".join(rows) + "\n")
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "market1501").symlink_to(tiny_world)
    monkeypatch.setenv("HOME", str(home))
    return tmp_path


def test_shell_commands(crops, capsys):
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    known = {"train": SMALL, "evaluate": ["--data-dir", "home/data", "--device", "cpu"], "extract": ["--device", "cpu"]}
    assert len(commands) == 6
    for command in commands:
        program, verb, *arguments = shlex.split(command.replace("~", str(crops / "home")))
        assert program == "fastreid-u"
        assert main([verb, *arguments, *known[verb]]) == 0, capsys.readouterr().err
    assert (crops / "features.npz").exists()


def test_python_snippets(crops, monkeypatch):
    real = fastreid_u.train

    def smaller(dataset, **options):
        from fastreid_u.data import load_dataset

        assert dataset == "synthetic"
        tiny = load_dataset("market1501", crops / "home" / "data")
        small = dict(
            height=64, width=32, arch="resnet10", weights=None, bn_group=None, workers=0, iters=2, epochs=1,
            batch_size=16, num_instances=4, k1=8, k2=3, eps=0.7, quiet=True, device="cpu",
        )  # fmt: skip
        return real(tiny, **options, **small)

    monkeypatch.setattr(fastreid_u, "train", smaller)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator).repeat_interleave(20, dim=0)
    features = torch.nn.functional.normalize(centres + 0.1 * torch.randn(80, 16, generator=generator), dim=1)
    snippets = blocks("python")
    assert len(snippets) == 2
    run: dict = {}
    exec(snippets[0], run)
    count = len(list((crops / "path" / "to" / "crops").glob("*.jpg")))
    assert run["features"].shape == (count, run["model"].num_features)
    assert count == 48
    assert not run["unreadable"]

    pieces = {"fastreid_u": fastreid_u, "features": features, "batch_labels": torch.arange(4).repeat_interleave(4)}
    pieces["batch_features"] = features[::5].clone().requires_grad_()
    exec(snippets[1], pieces)
    assert torch.equal(pieces["labels"].unique(), torch.arange(4))
    before = pieces["memory"].features.clone()
    pieces["loss"].backward()
    assert not torch.equal(pieces["memory"].features, before)


def test_the_module_prints_what_the_machine_offers():
    done = subprocess.run([sys.executable, "-m", "fastreid_u"], capture_output=True, text=True, check=True)
    for word in ("python", "torch", "triton", "numba", "_C", "cupy", "faiss", "gpu"):
        assert re.search(rf"(yes|no ) +{word}\b", done.stdout), word
