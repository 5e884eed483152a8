# SPDX-License-Identifier: Apache-2.0
"""Functions stay small enough to be read at once. The counter reads syntax trees, and is itself checked."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_ARGUMENTS = 5  # of a function in engine/
MOST_LINES = 80  # of a body in the package; kernels are another trade
SCREEN = 50  # lines of ``train``

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(folder: Path) -> Iterator[tuple[str, Function]]:
    """Every function below ``folder``, methods and inner ones too, with file, line and name."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, Function):
                yield f"{path.relative_to(folder)}:{node.lineno} {node.name}", node


def argument_count(function: Function) -> int:
    """What a caller may pass; ``self`` and ``cls`` come by themselves, ``*more`` and ``**more`` count as one each."""
    given = function.args
    names = [argument.arg for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def engine_functions() -> Iterator[tuple[str, Function]]:
    """``train``'s arguments are the public interface, which this rule does not govern."""
    return ((where, node) for where, node in functions(ROOT / "fastreid_u" / "engine") if node.name != "train")


def test_no_function_of_the_engine_takes_more_than_five_arguments():
    counted = {where: argument_count(node) for where, node in engine_functions()}
    assert len(counted) > 50, "the functions were not found"
    assert {where: count for where, count in counted.items() if count > MOST_ARGUMENTS} == {}


def test_train_fits_one_screen():
    (train,) = (node for _, node in functions(ROOT / "fastreid_u" / "engine") if node.name == "train")
    assert body_lines(train) <= SCREEN


def test_no_function_of_the_package_is_longer_than_eighty_lines():
    counted = {where: body_lines(node) for where, node in functions(ROOT / "fastreid_u")}
    assert {where: count for where, count in counted.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("text", "arguments", "lines"),
    [
        ("def f(): pass", 0, 1),
        ("def f(a, /, b, *, c): pass", 3, 1),
        ("def f(self, a, *more, **rest):\n    '''Doc.'''\n    return (\n        a\n    )", 3, 3),
        ("async def f(a=1):\n    '''Only a docstring.'''", 1, 0),
    ],
)
def test_the_counter_counts(tmp_path, text, arguments, lines):
    (tmp_path / "x.py").write_text(text)
    ((where, node),) = functions(tmp_path)
    assert where == "x.py:1 f"
    assert (argument_count(node), body_lines(node)) == (arguments, lines)
