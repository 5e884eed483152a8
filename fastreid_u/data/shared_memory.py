# SPDX-License-Identifier: Apache-2.0
"""How much shared memory is free: containers have little of it unless they are told otherwise."""

import os
import shutil

_PLACE = "/dev/shm"


def free_shared_memory() -> int | None:
    """Bytes that can still be put into shared memory; None where it has no limit of its own."""
    return shutil.disk_usage(_PLACE).free if os.path.isdir(_PLACE) else None
