# SPDX-License-Identifier: Apache-2.0
"""The number of the form in which a run folder is kept: in config.toml, in the state and in the models."""

from pathlib import Path

# It rises when a version writes what older ones would misread. Layout 3 has no number in config.toml.
LAYOUT = 4
READABLE_LAYOUTS = (3, 4)


class LayoutError(ValueError):
    """The run folder was written by a version that keeps runs in another form."""


def require_readable(op: str, path: Path, layout: object) -> None:
    """Refuse what is of another ``layout`` than this version reads.

    Raises:
        LayoutError: names the layout, and what to do.
    """
    if layout in READABLE_LAYOUTS:
        return
    newer = not isinstance(layout, int) or layout > LAYOUT
    raise LayoutError(
        f"{op}: {path} must have run layout {' or '.join(map(str, READABLE_LAYOUTS))} for this version, got layout "
        f"{layout!r} of {'a newer' if newer else 'an older'} fastreid_u; use that version for it, or start another run "
        "in another logs_dir"
    )
