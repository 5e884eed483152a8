# SPDX-License-Identifier: Apache-2.0
"""The time that a run takes is told while there is much of it left."""

import re

import pytest

from fastreid_u.config import Config
from fastreid_u.engine.pace import Pace, duration


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (59, "59 s"), (60, "1 min"), (750, "12 min"), (5399, "90 min"), (5400, "1.5 h"),
        (93_600, "26 h"), (172_800, "2.0 days"), (864_000, "10 days"),
    ],
)  # fmt: skip
def test_durations_have_two_digits_and_a_unit(seconds, text):
    assert duration(seconds) == text


def test_the_steps_of_the_first_epoch_tell_how_long_the_run_takes():
    clock = Clock()
    pace = Pace(Config(epochs=3, eval_step=2), clock)
    pace.measured({"extract": 10.0, "label": 2.0, "evaluate": 8.0})
    clock.now += 500.0  # the first step waits for workers and chooses kernels: not counted
    assert pace.note(0, 1, 100) == ""
    clock.now += 9 * 4.0
    assert pace.left_in_fit(0, 10, 100) == pytest.approx(90 * 4 + 2 * (12 + 400) + 2 * 8)
    assert pace.note(0, 10, 100) == "  about 20 min left in the run"


def test_after_the_first_epoch_the_rest_is_told():
    pace = Pace(Config(epochs=12, eval_step=5), Clock())
    pace.measured({"extract": 5.0, "label": 1.0, "fit": 54.0})
    assert pace.left_after(0) == pytest.approx(11 * 60), "what an evaluation takes is not known yet"
    pace.measured({"evaluate": 20.0})
    assert pace.left_after(0) == pytest.approx(11 * 60 + 3 * 20)
    assert pace.line(0) == "about 12 min left, until epoch 11"
    assert pace.left_after(11) == 0


def test_nothing_is_told_where_little_is_left():
    clock = Clock()
    pace = Pace(Config(epochs=2), clock)
    pace.measured({"extract": 1.0, "label": 1.0, "fit": 3.0})
    pace.note(0, 1, 3)
    clock.now += 1.0
    assert pace.note(0, 2, 3) == ""
    assert pace.line(0) is None
    assert pace.line(1) is None


def test_a_run_shows_and_logs_the_time_that_is_left(smoke, monkeypatch):
    monkeypatch.setattr("fastreid_u.engine.pace.WORTH_A_LINE", 0.0)
    monkeypatch.setattr("fastreid_u.engine.display.PLAIN_SECONDS", 0.0)
    monkeypatch.setattr("fastreid_u.engine.loop.draw_curves", lambda *_, **__: None)
    run = smoke("cluster_contrast", print_freq=2, iters=3)
    log = (run.folder / "log.txt").read_text()
    assert re.search(r"  epoch 0 2/3 steps  loss [\d.]+  about \d+ s left in the run\n", log)
    assert len(re.findall(r"^about \d+ s left, until epoch 1$", log, re.MULTILINE)) == 1
