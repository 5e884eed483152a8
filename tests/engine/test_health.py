# SPDX-License-Identifier: Apache-2.0
"""What is said about an epoch's labels, and how it is said."""

import io
import warnings

import numpy as np
import pytest

from fastreid_u.engine.card import metric_block, table_head, table_row
from fastreid_u.engine.curves import draw_curves
from fastreid_u.engine.display import Display
from fastreid_u.engine.health import agreement, as_partition, label_health


def test_unclustered_images_count_as_clusters_of_their_own():
    assert as_partition(np.array([0, -1, 1, -1, 0])).tolist() == [0, 2, 1, 3, 0]
    assert as_partition(np.array([-1, -1])).tolist() == [0, 1]
    assert as_partition(np.array([], dtype=int)).tolist() == []


def test_labelling_only_the_easy_half_does_not_look_perfect():
    pids = np.repeat(np.arange(10), 10)
    half = np.where(np.arange(100) % 10 < 5, pids, -1)
    assert agreement(pids, pids) == 1.0
    assert agreement(half, pids) < 0.5


def test_health_of_a_hand_made_case():
    labels = np.array([0, 0, 0, 1, 1, -1])
    health = label_health(labels, np.array([0, 0, 0, 1, 1, -1]), np.array([5, 5, 5, 6, 6, -1]))
    assert health == {
        "clusters": 2, "unclustered": pytest.approx(1 / 6), "largest": 3, "agreement": 1.0, "ari": 1.0,
        "nmi": pytest.approx(1.0),
    }  # fmt: skip


def test_labels_with_gaps_are_counted_and_cost_no_memory():
    health = label_health(np.array([7, 7, 2**31 - 1, -1]), None, None)
    assert (health["clusters"], health["largest"]) == (2, 2)


def test_health_without_truth_past_or_clusters():
    health = label_health(np.array([-1, -1]), None, np.array([-1, -1]))
    assert health == {
        "clusters": 0, "unclustered": 1.0, "largest": 0, "agreement": None, "ari": None, "nmi": None
    }  # fmt: skip
    assert label_health(np.array([], dtype=int), None, None)["unclustered"] == 0.0


def test_table_rows_stand_under_their_head():
    full = {"epoch": 3, "clusters": 61, "unclustered": 0.034, "largest": 30, "agreement": 0.91, "ari": 0.88,
            "nmi": 0.97, "loss": 1.234, "mAP": 0.7542, "top1": 0.901,
            "seconds": {"extract": 1.0, "label": 0.5, "fit": 3.25, "evaluate": 1.5}}  # fmt: skip
    head, row, bare = table_head(), table_row(full), table_row({"epoch": -1})
    for name, value in (("clusters", "61"), ("unclust.", "3.4%"), ("mAP", "75.4%"), ("top-1", "90.1%")):
        end = head.index(name) + len(name)
        assert row[:end].endswith(value)
        assert bare[:end].endswith("-")
    assert "None" not in bare


def test_final_block_has_the_usual_lines():
    lines = metric_block({"mAP": 0.823, "top1": 0.923, "top5": 0.967, "top10": 0.979, "mINP": 0.5})
    assert lines[:2] == ["Mean AP: 82.3%", "CMC Scores:"]
    assert [line.split() for line in lines[2:5]] == [["top-1", "92.3%"], ["top-5", "96.7%"], ["top-10", "97.9%"]]


def test_curves_are_drawn_even_from_little(tmp_path):
    odd = "fold\udcffer"  # a name whose bytes are no text
    draw_curves([{"epoch": 0, "clusters": 3, "unclustered": 0.5, "loss": 1.0}], tmp_path / "curves.png", odd)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_name_what_was_ranked(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title: titles.append(title))
    record = {"epoch": 0, "clusters": 3, "unclustered": 0.5, "loss": 1.0}
    draw_curves([record | {"mAP": 0.5, "top1": 0.6}], tmp_path / "a.png", "a", ranked_on="training images themselves")
    draw_curves([record | {"mAP": 0.5, "top1": 0.6}], tmp_path / "b.png", "b")
    draw_curves([record], tmp_path / "c.png", "c")
    assert [title for title in titles if title.startswith("ranking")] == [
        "ranking on the training images themselves, %", "ranking on the test split, %", "ranking: not evaluated",
    ]  # fmt: skip


def test_display_keeps_its_lines_until_it_has_a_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("an earlier run's\n")
    display = Display(quiet=True)
    display.line("before the folder is known")
    assert log.read_text() == "an earlier run's\n"
    display.log_to(log)
    display.line("after")
    assert log.read_text() == "an earlier run's\nbefore the folder is known\nafter\n"


def test_display_logs_what_it_prints_and_is_plain_without_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("fastreid_u.engine.display.PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    display = Display(tmp_path / "log.txt", stream=stream)
    display.line("hello")
    with display.phase("extract", 2) as advance:
        advance(1)
        advance(1, note="done")
    assert stream.getvalue() == (tmp_path / "log.txt").read_text()
    assert stream.getvalue().splitlines() == ["hello", "  extract 1/2 images", "  extract 2/2 images  done"]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_display_says_what_cannot_be_encoded_in_escapes(tmp_path, terminal):
    """A file name may hold any byte, and a stream any encoding."""

    class Narrow(io.TextIOWrapper):
        def isatty(self):
            return terminal

    stream = Narrow(io.BytesIO(), encoding="ascii")
    display = Display(tmp_path / "log.txt", stream=stream)
    with display.phase("extract", 1):
        display.line("truncé \udce9.jpg")
    stream.flush()
    assert b"trunc\\xe9 \\udce9.jpg\n" in stream.buffer.getvalue().replace(b"\r", b"")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "truncé \\udce9.jpg\n"


def test_display_shows_bars_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    display = Display(tmp_path / "log.txt", stream=stream)
    with display.phase("extract", 2) as advance:
        advance(1)
        display.line("said [in] between")
        advance(1)
    assert "said [in] between" in stream.getvalue()
    assert (tmp_path / "log.txt").read_text() == "said [in] between\n"


def test_python_warnings_become_lines_once(tmp_path):
    stream = io.StringIO()
    display = Display(tmp_path / "log.txt", stream=stream)
    with display.hearing_warnings():
        for _ in range(3):
            warnings.warn("k1 clipped", RuntimeWarning, stacklevel=1)
    assert stream.getvalue() == "warning: k1 clipped\n"


def test_quiet_is_quiet_but_logs(tmp_path):
    stream = io.StringIO()
    Display(tmp_path / "log.txt", quiet=True, stream=stream).line("hello")
    assert stream.getvalue() == ""
    assert (tmp_path / "log.txt").read_text() == "hello\n"


def test_quiet_warnings_are_logged_and_stay_warnings_once(tmp_path):
    display = Display(tmp_path / "log.txt", quiet=True)
    with warnings.catch_warnings(record=True) as caught, display.hearing_warnings():
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn("k1 clipped", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["k1 clipped"]
    assert (tmp_path / "log.txt").read_text() == "warning: k1 clipped\n"
