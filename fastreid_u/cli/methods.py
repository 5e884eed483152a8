# SPDX-License-Identifier: Apache-2.0
"""``fastreid-u methods``."""

import argparse


def methods(words: list[str]) -> None:
    """List the methods."""
    argparse.ArgumentParser(prog="fastreid-u methods", description=methods.__doc__).parse_args(words)

    from fastreid_u import recipes

    names = recipes.methods()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {recipes.get_method(name).paper.title}")
