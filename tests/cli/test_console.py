# SPDX-License-Identifier: Apache-2.0
"""Commands without a console, or with half of one: silence or one line, never a traceback."""

import os
import subprocess
import sys

import pytest

from fastreid_u import cli


def test_a_shell_that_closes_standard_output(tmp_path):
    words = f"'{sys.executable}' -m fastreid_u methods >&-"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("words", [["methods"], ["doctor"], [], ["evaluate", "nowhere"], ["train", "--resume"]])
def test_no_standard_output_and_no_standard_error(words, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(words) == (words[:1] in (["evaluate"], ["train"]))


def test_an_error_without_standard_error_does_not_go_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["evaluate", "nowhere"]) == 1
    assert capsys.readouterr().out == ""


def test_a_name_in_an_error_does_not_act_on_the_terminal(capsys):
    assert cli.main(["evaluate", "no\x1b[2Jwhere"]) == 1
    assert "got no\\x1b[2Jwhere (no" in capsys.readouterr().err


def test_files_do_not_get_the_numbers_of_closed_streams(monkeypatch):
    """What a library prints would be written into them."""
    opened = []

    def fstat(number):
        if number > 0:
            raise OSError("closed")

    monkeypatch.setattr(cli.os, "fstat", fstat)
    monkeypatch.setattr(cli.os, "open", lambda path, flags: opened.append(path) or 99)
    monkeypatch.setattr(cli.os, "set_inheritable", lambda number, yes: None)
    cli._fill_closed_descriptors()
    monkeypatch.undo()
    assert opened == [os.devnull] * 2


@pytest.mark.parametrize("command", ["evaluate", "extract"])
def test_how_images_are_read_is_passed_on(command, monkeypatch, tmp_path, capsys):
    calls = []

    def record(run, images, **more):
        calls.append(more)
        raise ValueError("seen")

    monkeypatch.setattr(f"fastreid_u.trained.{command}.{command}", record)
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "run", "images", "-j", "0", "--worker-start", "spawn", "--truncated-images"]) == 1
    assert capsys.readouterr().err == "error: seen\n"
    wanted = {"workers": 0, "worker_start": "spawn", "truncated_images": True}
    assert wanted.items() <= calls[0].items()
    assert cli.main([command, "run", "images"]) == 1
    assert (calls[1]["workers"], calls[1]["worker_start"], calls[1]["truncated_images"]) == (4, None, None)
