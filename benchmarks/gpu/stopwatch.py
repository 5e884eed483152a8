# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the ``benchmark`` fixture for machines without pytest-benchmark, and its figures as JSON.

    PYTHONPATH=benchmarks pytest -p no:benchmark -p gpu.stopwatch --stopwatch-json=FILE benchmarks/bench_knn.py

It offers what the ``bench_*.py`` files use of pytest-benchmark (a call, ``pedantic``, ``group``, ``extra_info``,
``stats.stats.median``) and writes the same keys, so that ``make gpu`` reads one format, whatever is installed.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

_ENOUGH = 1.0  # seconds of calls, or
_ROUNDS = 5  # calls, whichever is more


class Stopwatch:
    """Times calls by the clock of the host: what is timed has to wait for its device."""

    def __init__(self, name: str, group: str | None) -> None:
        self.name, self.group = name, group
        self.extra_info: dict[str, Any] = {}
        self.seconds: list[float] = []

    @property
    def stats(self) -> SimpleNamespace | None:
        if not self.seconds:
            return None
        return SimpleNamespace(
            stats=SimpleNamespace(
                median=statistics.median(self.seconds), min=min(self.seconds), rounds=len(self.seconds)
            )
        )

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)  # compiles
        while sum(self.seconds) < _ENOUGH or len(self.seconds) < _ROUNDS:
            result = self._timed(function, args, kwargs)
            if len(self.seconds) >= 1000:
                break
        return result

    def pedantic(
        self, target: Callable, args: tuple = (), kwargs: dict | None = None, *, rounds: int = 1, warmup_rounds: int = 0
    ) -> Any:
        for _ in range(warmup_rounds):
            target(*args, **(kwargs or {}))
        for _ in range(rounds):
            result = self._timed(target, args, kwargs or {})
        return result

    def _timed(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - begin)
        return result

    def row(self) -> dict[str, Any]:
        stats = vars(self.stats.stats) if self.seconds else {}
        return {"name": self.name, "group": self.group, "stats": stats, "extra_info": self.extra_info}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stopwatch-json", help="where the figures go")


def pytest_configure(config: pytest.Config) -> None:
    config.stopwatches = []
    config.addinivalue_line("markers", "benchmark: group=... for the figures")


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Iterator[Stopwatch]:
    marker = request.node.get_closest_marker("benchmark")
    watch = Stopwatch(request.node.name, marker.kwargs.get("group") if marker else None)
    request.config.stopwatches.append(watch)
    yield watch
    write(request.config)  # now: a stage that runs out of time kills this process


def pytest_sessionfinish(session: pytest.Session) -> None:
    write(session.config)


def write(config: pytest.Config) -> None:
    path = config.getoption("--stopwatch-json")
    if path:
        rows = [watch.row() for watch in config.stopwatches if watch.seconds]
        part = Path(f"{path}.part")
        part.write_text(json.dumps({"benchmarks": rows}, default=float))
        part.replace(path)
