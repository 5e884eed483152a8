# SPDX-License-Identifier: Apache-2.0
"""What this installation can do, as a table for people."""

from fastreid_u import __version__, _env


def capability_table() -> str:
    """A line per capability: whether it is there, its name, its version or why not; then what is newer than tested."""
    rows = _env.capabilities()
    width = max(len(row.name) for row in rows)
    lines = [f"  {'yes' if row.present else 'no ':3}  {row.name:{width}}  {row.detail}" for row in rows]
    if newer := _env.newer_than_tested():
        lines.append(f"  newer than tested: {', '.join(newer)}")
    return "\n".join([f"fastreid_u {__version__}", *lines])
