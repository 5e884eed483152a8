# SPDX-License-Identifier: Apache-2.0
"""The house has floors, and imports only point down. The checker reads syntax trees, and is itself checked."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the ground up. A module belongs to the floor that lists it or the package it is in.
FLOORS = [
    ("ground", ["kernels", "reference", "cpu", "_C"]),
    (
        "environment",
        [
            "_env",
            "_ext",
            "_checks",
            "_label_checks",
            "_default_device",
            "_text",
            "_toml",
            "config",
            "pixel_norm",
            "ranks",
        ],
    ),
    ("ops", ["ops"]),
    ("parts", ["recipe", "images", "draws", "labels", "memory", "models", "data"]),
    ("recipes", ["recipes"]),
    ("engine", ["engine"]),
    ("trained", ["trained"]),
    ("roof", ["", "cli", "doctor", "__main__"]),
]
HEIGHT = {module: height for height, (_, modules) in enumerate(FLOORS) for module in modules}

# What a ground module may import besides the standard library; a kernel not even that, but for the types of its
# settings, so that it can be copied out.
GROUND = {
    "kernels": {"torch", "triton", "typing"},
    "reference": {"torch", "numpy", "scipy", "sklearn"},
    "cpu": {"numpy", "numba"},
}
# Backends: known to ops/ alone, but for the probes.
BACKENDS = {"fastreid_u.kernels", "fastreid_u.cpu", "fastreid_u._ext", "fastreid_u._C", "cupy", "faiss", "infomap"}
BACKEND_USERS = {"fastreid_u._env": {"fastreid_u._ext"}, "fastreid_u._ext": {"fastreid_u._C"}}


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the package; kernels/ is installed inside it."""
    for folder, prefix in ((root / "fastreid_u", "fastreid_u"), (root / "kernels", "fastreid_u.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([prefix, *(part for part in parts if part != "__init__")]), path


def imports(name: str, path: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute module of every import, wherever in the file it stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from a import b` means the module a.b if there is one, else a name in a
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules or inner == "fastreid_u._C" else base
        elif (
            isinstance(node, ast.Call)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def part_of(module: str) -> str:
    """The first name below the package: "ops" for fastreid_u.ops.knn."""
    return module.split(".")[1] if "." in module else ""


def import_violations(root: Path) -> list[str]:
    found = []
    modules = dict(sources(root))
    known = set(modules) | {f"fastreid_u.{part}" for part in HEIGHT if part}
    for name, path in modules.items():
        here = part_of(name)
        if here not in HEIGHT:
            found.append(f"{name}: is on no floor")
            continue
        for line, target in imports(name, path, known):
            where = f"{name}:{line}: imports {target}"
            allowed = here == "ops" or within(target, BACKEND_USERS.get(name, set()))
            if here in GROUND:
                found += ground_violations(where, name, target, path)
            elif within(target, BACKENDS) and not allowed:
                found.append(f"{where}, which only ops/ may")
            elif within(target, {"fastreid_u"}) and part_of(target) not in HEIGHT:
                found.append(f"{where}, which is on no floor")
            elif within(target, {"fastreid_u"}) and HEIGHT[part_of(target)] > HEIGHT[here]:
                found.append(f"{where}, which is above it")
    return found


def ground_violations(where: str, name: str, target: str, path: Path) -> list[str]:
    here = part_of(name)
    if within(target, {"fastreid_u"}):
        alone = f"fastreid_u.{here}"  # what stands alone: the references, the numba side, each kernel's file or folder
        if here == "kernels":
            alone = name if path.parent.name == "kernels" or path.name == "__init__.py" else name.rpartition(".")[0]
        return [] if within(target, {alone}) else [f"{where}, but the ground stands alone"]
    top = target.partition(".")[0]
    standard = top == "__future__" or (here != "kernels" and top in sys.stdlib_module_names)
    return [] if standard or top in GROUND[here] else [f"{where}, which {here}/ may not"]


def circle_violations(root: Path) -> list[str]:
    """No two files need each other, however late they import: one of them can then be read, tested and moved alone."""
    modules = dict(sources(root))
    needs = {name: {target for _, target in imports(name, path, set(modules))} for name, path in modules.items()}
    needs = {name: sorted(targets & set(modules)) for name, targets in needs.items()}
    found = []
    while True:
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]  # each module imports the next
            found.append(f"{' imports '.join(circle)}: a circle")
            needs[circle[0]].remove(circle[1])
        else:
            return found


def privacy_violations(root: Path) -> list[str]:
    """A private file or folder (``_x.py``, ``_x/``) is used in the folder that holds it, and below."""
    found = []
    modules = dict(sources(root))
    for name, path in modules.items():
        for line, target in imports(name, path, set(modules)):
            parts = target.split(".")
            homes = {".".join(parts[:i]) for i, part in enumerate(parts) if is_private(part)}
            if within(target, {"fastreid_u"}) and not all(within(name, {home}) for home in homes):
                found.append(f"{name}:{line}: imports {target}, which is private")
    return found


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def blind_violations(root: Path) -> list[str]:
    """A reference or kernel names its siblings relatively only: an absolute name would tie it to the package."""
    return [
        f"{path.relative_to(root)}:{node.lineno}: imports fastreid_u by name"
        for folder in (root / "fastreid_u" / "reference", root / "kernels")
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and within(node.module, {"fastreid_u"}))
        or (isinstance(node, ast.Import) and any(within(alias.name, {"fastreid_u"}) for alias in node.names))
    ]


def rank_violations(root: Path) -> list[str]:
    """Ranks have one room: only ranks.py asks torch.distributed how many there are, and lets them exchange."""
    found = []
    for name, path in sources(root):
        if name == "fastreid_u.ranks":
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                named = [ast.unparse(node)]
            if any(within(each, {"torch.distributed"}) for each in named):
                found.append(f"{name}:{node.lineno}: asks torch.distributed, which only ranks.py may")
    return found


def style_violations(root: Path) -> list[str]:
    """No swallowed errors, no assert on users' input, no drawer for everything."""
    found = []
    for name, path in sources(root):
        if path.stem in ("utils", "util", "helpers", "misc", "common"):
            found.append(f"{name}: a file is named after its one idea")
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Assert):
                found.append(f"{name}:{node.lineno}: assert")
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            ):
                found.append(f"{name}:{node.lineno}: catches everything")
    return found


def licence_violations(root: Path) -> list[str]:
    found = []
    for folder in ("fastreid_u", "kernels", "csrc", "tests", "benchmarks"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in (".py", ".h", ".cpp", ".cu", ".cuh"):
                continue
            first = path.read_text().partition("\n")[0]
            if first not in ("# SPDX-License-Identifier: Apache-2.0", "// SPDX-License-Identifier: Apache-2.0"):
                found.append(f"{path.relative_to(root)}: first line is not the SPDX line")
    return found


CHECKS = [
    import_violations,
    circle_violations,
    privacy_violations,
    blind_violations,
    rank_violations,
    style_violations,
    licence_violations,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house_is_in_order(check) -> None:
    assert len(list(sources(ROOT))) > 10, "the sources were not found"
    assert check(ROOT) == []


SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
LAZY_X = "def f():\n    from fastreid_u.ops import x"
X_NEEDS_Y = {"fastreid_u/ops/x.py": "from . import y"}
Y = {"fastreid_u/ops/_y.py": ""}


@pytest.mark.parametrize(
    ("check", "files", "message"),
    [
        (import_violations, {"fastreid_u/ops/x.py": "import fastreid_u.engine.fit"}, "above it"),
        (import_violations, {"fastreid_u/ops/x.py": "from fastreid_u import engine"}, "above it"),
        (import_violations, {"fastreid_u/ops/x.py": "from fastreid_u import knn"}, "above it"),
        (import_violations, {"fastreid_u/ops/x.py": "from ..engine import fit"}, "above it"),
        (import_violations, {"fastreid_u/ops/x.py": "def f():\n    import fastreid_u.labels"}, "above it"),
        (import_violations, {"fastreid_u/memory.py": "from fastreid_u.recipes import cap"}, "above it"),
        (import_violations, {"fastreid_u/memory.py": "import_module('fastreid_u.cli')"}, "above it"),
        (import_violations, {"fastreid_u/engine/x.py": "from fastreid_u.kernels import knn"}, "only ops/ may"),
        (import_violations, {"fastreid_u/engine/x.py": "import faiss"}, "only ops/ may"),
        (import_violations, {"fastreid_u/engine/x.py": "from fastreid_u import _C"}, "only ops/ may"),
        (import_violations, {"fastreid_u/_checks.py": "from fastreid_u import _ext"}, "only ops/ may"),
        (import_violations, {"kernels/x.py": "import numpy"}, "kernels/ may not"),
        (import_violations, {"kernels/x.py": "import math"}, "kernels/ may not"),
        (import_violations, {"kernels/x.py": "from fastreid_u.kernels import y"}, "the ground stands alone"),
        (import_violations, {"kernels/x.py": "from . import y"}, "the ground stands alone"),
        (import_violations, {"kernels/x/y.py": "from ..z import w"}, "the ground stands alone"),
        (import_violations, {"kernels/x/__init__.py": "from ..z import w"}, "the ground stands alone"),
        (import_violations, {"fastreid_u/reference/x.py": "import pandas"}, "reference/ may not"),
        (
            import_violations,
            {"fastreid_u/reference/x.py": "from fastreid_u._checks import y"},
            "the ground stands alone",
        ),
        (import_violations, {"fastreid_u/cpu/x.py": "import torch"}, "cpu/ may not"),
        (import_violations, {"fastreid_u/elsewhere.py": "import os"}, "on no floor"),
        (circle_violations, {"fastreid_u/ops/y.py": LAZY_X, **X_NEEDS_Y}, "ops.x imports"),
        (circle_violations, {"fastreid_u/ops/y.py": "import_module('fastreid_u.ops.x')", **X_NEEDS_Y}, "a circle"),
        (
            circle_violations,
            {
                **X_NEEDS_Y,
                "fastreid_u/ops/y.py": "if TYPE_CHECKING:\n    from fastreid_u.cli import z",
                "fastreid_u/cli.py": LAZY_X,
            },
            "fastreid_u.cli imports fastreid_u.ops.x imports fastreid_u.ops.y",
        ),
        (privacy_violations, {"fastreid_u/engine/x.py": "from fastreid_u.ops._y import z", **Y}, "which is private"),
        (privacy_violations, {"fastreid_u/engine/x.py": "from fastreid_u.ops import _y", **Y}, "which is private"),
        (privacy_violations, {"fastreid_u/x.py": "import_module('fastreid_u.ops._y')", **Y}, "which is private"),
        (privacy_violations, {"fastreid_u/x.py": "from .ops._y.z import a", **Y}, "which is private"),
        (blind_violations, {"fastreid_u/reference/x.py": "from fastreid_u.reference import knn"}, "by name"),
        (rank_violations, {"fastreid_u/ops/x.py": "import torch.distributed as dist"}, "only ranks.py"),
        (rank_violations, {"fastreid_u/memory/x.py": "from torch import distributed"}, "only ranks.py"),
        (rank_violations, {"fastreid_u/engine/x.py": "from torch.distributed import get_rank"}, "only ranks.py"),
        (rank_violations, {"fastreid_u/recipe.py": "def f():\n    return torch.distributed"}, "only ranks.py"),
        (blind_violations, {"kernels/x/y.py": "from fastreid_u.kernels.x import z"}, "by name"),
        (style_violations, {"fastreid_u/ops/x.py": "try:\n    f()\nexcept Exception:\n    pass"}, "catches everything"),
        (style_violations, {"fastreid_u/ops/x.py": "try:\n    f()\nexcept:\n    pass"}, "catches everything"),
        (style_violations, {"fastreid_u/ops/x.py": "assert x"}, "assert"),
        (style_violations, {"fastreid_u/utils.py": ""}, "one idea"),
        (licence_violations, {"benchmarks/x.py": "import os"}, "SPDX"),
        (licence_violations, {"csrc/x.cu": "int x;"}, "SPDX"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, check, files: dict[str, str], message: str) -> None:
    for file, text in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if check is licence_violations else SPDX + text)
    found = check(tmp_path)
    assert len(found) == 1
    assert message in found[0]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    files = {
        "fastreid_u/__init__.py": "import importlib\nfrom fastreid_u.engine import train",
        "fastreid_u/ops/x.py": "import faiss\nfrom fastreid_u import _env, _ext\nfrom fastreid_u.kernels import x",
        "fastreid_u/ranks.py": "import torch.distributed as dist",
        "fastreid_u/reference/x.py": "import math\nimport torch\nfrom .y import z",
        "fastreid_u/recipes/x.py": "from fastreid_u.recipes import y\nfrom fastreid_u.recipe import Recipe",
        "kernels/x.py": "from __future__ import annotations\nimport torch\nimport triton.language as tl",
        "kernels/y/__init__.py": "import torch\nfrom .z import w",
        "kernels/y/z.py": "from typing import NamedTuple\nfrom .v import w",
        "kernels/y/v.py": "import triton",
    }
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(SPDX + text)
    assert [found for check in CHECKS for found in check(tmp_path)] == []
