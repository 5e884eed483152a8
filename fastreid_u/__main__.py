# SPDX-License-Identifier: Apache-2.0
"""``python -m fastreid_u`` prints what this machine offers; with arguments it is the command line."""

from __future__ import annotations

import sys

from fastreid_u import __version__, _env


def main(argv: list[str]) -> int:
    """Print the capability table, or hand ``argv`` to the command line if there is any."""
    if argv:
        from fastreid_u import cli

        return cli.main(argv)
    rows = _env.capabilities()
    width = max(len(row.name) for row in rows)
    print(f"fastreid_u {__version__}")
    for row in rows:
        print(f"  {'yes' if row.present else 'no ':3}  {row.name:{width}}  {row.detail}")
    if newer := _env.newer_than_tested():
        print(f"  newer than tested: {', '.join(newer)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
