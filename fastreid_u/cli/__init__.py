# SPDX-License-Identifier: Apache-2.0
"""The command line: each command is one function, in a file of its own, that takes the words after its name.

The files import argparse and little else; a command imports what it needs once it has been called.
"""

import argparse
import os
import sys

from fastreid_u._text import visible
from fastreid_u.cli.doctor import doctor
from fastreid_u.cli.evaluate import evaluate
from fastreid_u.cli.extract import extract
from fastreid_u.cli.methods import methods
from fastreid_u.cli.train import train

DESCRIPTION = "Unsupervised person re-identification. Without a command: what this installation can do."

# Errors that end a command with one line.
_NAMED = (
    ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, OSError, ImportError, MemoryError,
)  # fmt: skip

COMMANDS = {
    "train": (train, "learn a feature from unlabelled images"),
    "evaluate": (evaluate, "mAP and CMC of a trained network"),
    "extract": (extract, "features of a folder of crops, as a NumPy .npz"),
    "methods": (methods, "list the methods"),
    "doctor": (doctor, "what this installation can do"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed with a message, 130 interrupted)."""
    _fill_closed_descriptors()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastreid-u", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    command, _ = COMMANDS[parser.parse_args(argv[:1]).command or "doctor"]
    try:
        command(argv[1:])
    except KeyboardInterrupt as stop:
        _complain("\n" + ": ".join(["interrupted", *map(str, stop.args)]))
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = None
        return 1
    except LookupError as error:  # its text is the key alone
        _complain(f"error: {type(error).__name__}: {error}")
        return 1
    except _NAMED as error:
        _complain(f"error: {error or type(error).__name__}")
        return 1
    return 0


def _complain(text: str) -> None:
    """``text`` on standard error, if there is one; what would act on a terminal becomes escapes."""
    if sys.stderr is not None:
        print("\n".join(visible(line) for line in text.split("\n")), file=sys.stderr)


def _fill_closed_descriptors() -> None:
    """Standard input, output and error that the caller closed (``>&-``) lead nowhere from here on.

    The next files to be opened, those of a run, would get their numbers otherwise, and with them what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
