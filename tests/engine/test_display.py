# SPDX-License-Identifier: Apache-2.0
"""A console that is none, and text that would act on one."""

import errno
import io
import sys

import pytest

from fastreid_u._text import visible
from fastreid_u.engine.display import Display


class Sink:
    """A stream of one's own that can write and nothing else, as some services and notebooks put in place."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class OddlyEncoded(io.StringIO):
    encoding = "no-such-encoding"


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, closed, Sink, OddlyEncoded])
def test_standard_output_that_is_no_terminal_or_not_there(tmp_path, monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", make())
    display = Display(tmp_path / "log.txt")
    with display.phase("extract", 1) as advance, display.hearing_warnings():
        display.line("hello")
        advance(1)
    assert not display.interactive
    shown = sys.stdout
    monkeypatch.undo()
    assert (tmp_path / "log.txt").read_text() == "hello\n"
    if isinstance(shown, Sink):
        assert shown.text == "hello\n"


def test_standard_output_that_is_closed_in_the_middle(tmp_path):
    stream = io.StringIO()
    display = Display(tmp_path / "log.txt", stream=stream)
    display.line("before")
    stream.close()
    display.line("after")
    with display.phase("extract", 1) as advance:
        advance(1)
    assert (tmp_path / "log.txt").read_text() == "before\nafter\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ünï 行 🚶.jpg", "plain ünï 行 🚶.jpg"),
        ("a\nb", "a\\nb"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("a\r\tb\x7f\x9b1m", "a\\r\\tb\\x7f\\x9b1m"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("\u2028\u2029", "\\u2028\\u2029"),
    ],
)
def test_names_that_would_act_on_a_terminal_are_shown_in_escapes(tmp_path, text, expected):
    assert visible(text) == expected
    stream = io.StringIO()
    Display(tmp_path / "log.txt", stream=stream).line(text)
    assert stream.getvalue() == expected + "\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == expected + "\n"


def test_a_warning_of_several_lines_keeps_them(tmp_path):
    stream = io.StringIO()
    with (display := Display(stream=stream)).hearing_warnings():
        import warnings

        warnings.warn("first\n  second \x1b[1m", RuntimeWarning, stacklevel=1)
    assert stream.getvalue() == "warning: first\n  second \\x1b[1m\n"
    assert not display.quiet


def test_once(tmp_path):
    stream = io.StringIO()
    display = Display(stream=stream)
    for text in ("a", "b", "a"):
        display.once(text)
    assert stream.getvalue() == "a\nb\n"


def test_a_stream_on_a_full_device_does_not_end_a_run(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    display = Display(stream=Full())
    display.log_to(tmp_path / "log.txt")
    display.line("one")
    display.line("two")
    note = "note: nothing more is shown on standard output: No space left on device"
    assert (tmp_path / "log.txt").read_text().splitlines() == ["one", note, "two"]
    with pytest.raises(OSError, match="No space left"):
        Display(stream=Full()).line("figures that are nowhere else")
