# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u doctor``, and ``fastreid-u`` alone."""

import argparse


def doctor(words: list[str]) -> None:
    """Print what this installation can do."""
    argparse.ArgumentParser(prog="fastreid-u doctor", description=doctor.__doc__).parse_args(words)

    from fastreid_u.doctor import capability_table

    print(capability_table())
