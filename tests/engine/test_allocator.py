# SPDX-License-Identifier: Apache-2.0
"""glibc keeps freed memory while features are extracted on a CPU, and only then."""

from unittest.mock import Mock

import pytest
import torch

from fastreid_u.engine import allocator
from fastreid_u.engine.allocator import keeping_freed_memory


@pytest.fixture
def libc(monkeypatch):
    for name in allocator._OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_glibc", lambda: libc)
    libc = Mock()
    return libc


def test_settings_hold_in_the_block_and_end_with_an_error_too(libc):
    inside = []

    @keeping_freed_memory(torch.device("cpu"))
    def fails():
        inside.extend(call.args for call in libc.mallopt.call_args_list)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert inside == [(-4, 0), (-1, 2**31 - 1)]
    assert [call.args for call in libc.mallopt.call_args_list[2:]] == [(-4, 65536), (-3, 2**25), (-1, 2**26)]
    libc.malloc_trim.assert_called_once_with(0)


def test_a_block_within_another_changes_nothing(libc):
    with keeping_freed_memory(torch.device("cpu")):
        entered = len(libc.mock_calls)
        with keeping_freed_memory(torch.device("cpu")):
            pass
        assert len(libc.mock_calls) == entered
    libc.malloc_trim.assert_called_once_with(0)


def test_nothing_is_set_for_a_gpu_nor_over_a_users_own_settings(libc, monkeypatch):
    with keeping_freed_memory(torch.device("cuda")):
        pass
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with keeping_freed_memory(torch.device("cpu")):
        pass
    assert libc.mock_calls == []


def test_the_c_library_of_this_machine_takes_the_settings():
    libc = allocator._glibc()
    if libc is None:
        pytest.skip("no glibc")
    assert all(libc.mallopt(*setting) for setting in allocator._INSIDE + allocator._AFTER)
