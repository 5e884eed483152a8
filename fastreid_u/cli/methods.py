# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u methods``."""

import argparse


def methods(words: list[str]) -> None:
    """List the methods."""
    argparse.ArgumentParser(prog="fastreid-u methods", description=methods.__doc__).parse_args(words)

    from fastreid_u import recipes

    for name in recipes.methods():
        print(f"{name:<24} {recipes.get_method(name).paper.title}")
