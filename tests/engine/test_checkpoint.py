# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: damage of any kind is refused by name, and reading never waits."""

import os
import random
import socket
import stat

import pytest
import torch
from safetensors.torch import save_file

from fastreid_u.engine import checkpoint, own_file

TENSORS = {
    "recipe.model.weight": torch.arange(1200, dtype=torch.float32).reshape(30, 40),
    "recipe.half": torch.ones(7, 3, dtype=torch.bfloat16),
    "optimizer.0.step": torch.tensor(3.0),
    "recipe.rows": torch.zeros(0, 8),
    "readable": torch.tensor([True, False, True]),
    "labels": torch.tensor([0, -1, 2]),
    "bar": torch.tensor(torch.nan, dtype=torch.float64),
}
ABOUT = {"schema": 4, "epoch": 0, "data": "digest", "words": 'Möwe "x"\n'}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.write_described(path, TENSORS, ABOUT)
    return path


def same(a, b):
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def test_tensors_and_description_come_back(file):
    tensors, about = checkpoint.read_described(file)
    assert about == ABOUT
    assert tensors.keys() == TENSORS.keys()
    assert all(same(tensors[name], TENSORS[name]) for name in TENSORS)
    assert len(checkpoint.read_tensors(file)[1]["sha256"]) == 64


def test_a_flipped_bit_anywhere_is_refused(file):
    """200 of 200; a drive, a cable or memory flips bits without an error of its own."""
    whole, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [draw.randrange(header) for _ in range(60)] + [draw.randrange(len(whole)) for _ in range(140)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^train: .*state\.safetensors "):
            checkpoint.read_described(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-600] + bytes(600),  # a page that was never written
        lambda data: bytes(len(data)),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
)
def test_a_lost_page_or_a_torn_end_is_refused(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match=r"state\.safetensors is (damaged: the SHA-256|not a readable safetensors file)"
    ):
        checkpoint.read_tensors(file)


def test_tensors_taken_out_by_a_tool_are_missed(file):
    """Names, dtypes and shapes are under the checksum too."""
    tensors, metadata = checkpoint.read_tensors(file)
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != "optimizer.0.step"},
        tensors | {"labels": tensors["labels"].reshape(3, 1)},
        tensors | {"labels": tensors["labels"].view(torch.float64)},
        tensors | {"another": torch.zeros(1)},
    ):
        save_file(changed, file, metadata=metadata)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.read_tensors(file)
    save_file(tensors, file, metadata=metadata)
    assert checkpoint.read_tensors(file)[1] == metadata


def test_files_of_before_there_were_checksums_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"fastreid_u": '{"epoch": 1}'})
    assert checkpoint.read_described(tmp_path / "old.safetensors")[1] == {"epoch": 1}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)), "a socket"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)
    make(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=rf"^evaluate: .*x must be a regular file, got {kind}$"):
        own_file.read_own(tmp_path / "x", "evaluate")


def test_a_link_to_a_file_is_read(file, tmp_path):
    """Stores of models keep links to files of other names."""
    (tmp_path / "model.safetensors").symlink_to(file)
    assert checkpoint.read_described(tmp_path / "model.safetensors")[1] == ABOUT


def test_a_file_that_may_not_be_read_is_named(file, monkeypatch):
    def refused(path, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(own_file.os, "open", refused)
    with pytest.raises(
        PermissionError, match=r"load_model: .*state.safetensors must be .* read, got Permission denied"
    ):
        checkpoint.read_described(file, "load_model")


def test_writing_follows_no_link_and_uses_one_file_of_a_known_name(file, tmp_path, monkeypatch):
    """A killed process leaves at most that one."""
    mine = tmp_path / "mine.txt"
    mine.write_text("the user's")
    partial = checkpoint.partial_name(file, os.getpid())
    partial.symlink_to(mine)
    seen, flush = [], checkpoint.flush

    def look(opened):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        flush(opened)

    monkeypatch.setattr(checkpoint, "flush", look)
    checkpoint.write_described(file, TENSORS, ABOUT | {"epoch": 1})
    assert seen == [sorted([partial.name, "mine.txt", "state.safetensors"])]
    assert mine.read_text() == "the user's"
    assert checkpoint.read_described(file)[1]["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "state.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
