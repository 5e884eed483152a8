# SPDX-License-Identifier: Apache-2.0
"""The C++ core under the thread, address and undefined-behaviour sanitizers (tests/csrc/test_dbscan.cpp)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: set CXX, or put g++ or clang++ on PATH")


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The test program under one sanitizer."""
    sanitizer = request.param
    target = tmp_path_factory.mktemp("native") / "test_dbscan"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    command = [COMPILER, *flags, "-fno-sanitize-recover=all", str(SOURCE), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"{COMPILER} has no -fsanitize={sanitizer}: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    return sanitizer, target


def run(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(target), *arguments], capture_output=True, text=True, timeout=1200, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(f"the sanitizer cannot map its memory on this kernel: {done.stderr.splitlines()[0]}")
    return done


def test_core_is_clean(program: tuple[str, Path]) -> None:
    done = run(program[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all passed\n"
    assert done.stderr == ""


def test_sanitizer_is_awake(program: tuple[str, Path]) -> None:
    sanitizer, target = program
    done = run(target, "race" if sanitizer == "thread" else "8")
    assert done.returncode != 0
    assert ("data race" if sanitizer == "thread" else "heap-buffer-overflow") in done.stderr
