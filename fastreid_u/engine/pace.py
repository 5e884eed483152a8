# SPDX-License-Identifier: Apache-2.0
"""How long a run is going to take, from what its steps and phases have taken so far."""

import time
from collections.abc import Callable, Mapping

from fastreid_u.config import Config

WORTH_A_LINE = 60.0  # seconds that must be left for the log to have a line about them


class Pace:
    """Estimates the time from now to the run's end.

    Args:
        config: the run's, for its number of epochs and evaluations.
        clock: seconds, ascending.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.perf_counter) -> None:
        self.config = config
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._first_step_done = 0.0

    def measured(self, seconds: Mapping[str, float]) -> None:
        """Take note of what phases took: "extract", "label", "fit", "evaluate"; the last figures count.

        An extraction that was spared, since its features were at hand, takes no time.
        """
        self._seconds.update(seconds)

    def left_in_fit(self, epoch: int, done: int, steps: int) -> float | None:
        """Seconds to the run's end after ``done`` of ``epoch``'s ``steps``; None before the second of them.

        The first step is not counted: it waits for the first images, and kernels are chosen in it.
        """
        if done == 1:
            self._first_step_done = self._clock()
        if done < 2:
            return None
        step = (self._clock() - self._first_step_done) / (done - 1)
        here = step * (steps - done) + self._evaluations(epoch) * self._seconds.get("evaluate", 0.0)
        return here + self._after(epoch, step * steps)

    def note(self, epoch: int, done: int, steps: int) -> str:
        """What the progress of ``epoch``'s steps adds to its note; empty where little is left."""
        left = self.left_in_fit(epoch, done, steps)
        return "" if left is None or left < WORTH_A_LINE else f"  about {duration(left)} left in the run"

    def line(self, epoch: int) -> str | None:
        """The line after ``epoch``; None where little is left."""
        left = self.left_after(epoch)
        return f"about {duration(left)} left, until epoch {self.config.epochs - 1}" if left >= WORTH_A_LINE else None

    def left_after(self, epoch: int) -> float:
        """Seconds to the run's end after ``epoch``."""
        return self._after(epoch, self._seconds.get("fit", 0.0))

    def _after(self, epoch: int, fit: float) -> float:
        """Seconds that all epochs after ``epoch`` take if each fits for ``fit`` seconds."""
        later = range(epoch + 1, self.config.epochs)
        labels = self._seconds.get("extract", 0.0) + self._seconds.get("label", 0.0)
        evaluations = sum(self._evaluations(number) for number in later)
        return len(later) * (labels + fit) + evaluations * self._seconds.get("evaluate", 0.0)

    def _evaluations(self, epoch: int) -> bool:
        """Whether ``epoch`` ends with one."""
        return evaluation_due(self.config, epoch)


def evaluation_due(config: Config, epoch: int) -> bool:
    """Whether networks are evaluated after ``epoch``: every ``eval_step`` epochs, and after the last."""
    return (epoch + 1) % config.eval_step == 0 or epoch == config.epochs - 1


def duration(seconds: float) -> str:
    """``seconds`` in words, with two digits: "45 s", "12 min", "3.5 h", "26 h", "4.2 days"."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1.5 if unit == "h" else 1) * length:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 10 and unit != "min" else f"{count:.0f} {unit}"
    return f"{seconds:.0f} s"
