# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/architecture.svg: the floors of the package, what stands on each, and which floor imports which.

    python docs/draw_architecture.py

Imports and floors are read by the checker in ``test_architecture.py``, so the picture shows what that test enforces.
Another test draws it anew and compares, so it cannot fall behind the tree.
"""

import ast
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

WIDTH, MARGIN, GAP = 1000, 12, 10
LABEL, BUS, LANE = 126, 186, 22  # widths: names of the floors, arrows at the right, one arrow's lane
TITLE, TEXT = 15, 12  # font sizes
LINE = 16  # from one line of text to the next
COLOURS = ["#57534e", "#1d4ed8", "#0e7490", "#15803d", "#b45309", "#be123c", "#7c3aed", "#475569"]  # from the ground up
FONT = "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\""

# What has no Python docstring of its own.
UNDOCUMENTED = {"kernels": "The ops in Triton; each can be copied out.", "_C": "The label step in C++ and CUDA."}


class Box(NamedTuple):
    """A folder or a file on its floor."""

    title: str
    purpose: str
    files: list[str]  # public ones of a folder
    neighbours: list[str]  # on the same floor, imported by this one


class Floor(NamedTuple):
    name: str
    boxes: list[Box]
    imports: dict[int, int]  # from a lower floor's height to the number of pairs (importing file, imported file)


# What is drawn


def checker() -> ModuleType:
    """The test that enforces the floors, as a module."""
    (path,) = (ROOT / "tests").rglob("test_architecture.py")
    spec = importlib.util.spec_from_file_location("architecture_checker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_floors(root: Path, law: ModuleType) -> list[Floor]:
    """The floors from the ground up, without modules that ``root`` does not have."""
    modules = dict(law.sources(root))
    parts = {law.part_of(name) for name in modules} | {"_C"}
    height = {part: level for level, (_, listed) in enumerate(law.FLOORS) for part in listed}
    if homeless := parts - height.keys():
        raise ValueError(f"draw_architecture: every module must be on a floor, got {', '.join(sorted(homeless))}")
    beside: dict[str, set[str]] = {part: set() for part in parts}
    counts: list[dict[int, int]] = [{} for _ in law.FLOORS]
    for source, target in imported_pairs(modules, law):
        a, b = law.part_of(source), law.part_of(target)
        if height[a] > height[b]:
            counts[height[a]][height[b]] = counts[height[a]].get(height[b], 0) + 1
        elif a != b:
            beside[a].add(_title(b, modules))
    return [
        Floor(name, [_box(part, modules, sorted(beside[part])) for part in listed if part in parts], counts[level])
        for level, (name, listed) in enumerate(law.FLOORS)
    ]


def imported_pairs(modules: dict[str, Path], law: ModuleType) -> set[tuple[str, str]]:
    """Every module of ours with every other that it imports, anywhere in the file."""
    known = set(modules) | {"fastreid_u._C"}
    imports = ((name, target) for name, path in modules.items() for _, target in law.imports(name, path, known))
    return {(name, target) for name, target in imports if target in known and target != name}


def _title(part: str, modules: dict[str, Path]) -> str:
    if part == "_C":
        return "csrc/"
    path = modules.get(f"fastreid_u.{part}" if part else "fastreid_u")
    return f"{part or 'fastreid_u'}/" if path is None or path.name == "__init__.py" else f"{part}.py"


def _box(part: str, modules: dict[str, Path], neighbours: list[str]) -> Box:
    name = f"fastreid_u.{part}" if part else "fastreid_u"
    doc = UNDOCUMENTED.get(part) or ast.get_docstring(ast.parse(modules[name].read_text())) or ""
    sentence = " ".join(doc.replace("``", "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    inside = {other.split(".")[2] for other in modules if part and other.startswith(f"{name}.")}
    return Box(_title(part, modules), sentence, sorted(file for file in inside if not file.startswith("_")), neighbours)


# The picture


def draw(floors: list[Floor]) -> str:
    """The SVG of ``floors``: the roof at the top, arrows down the right side."""
    shapes: list[str] = []
    spans: dict[int, tuple[float, float]] = {}  # top and bottom of each floor
    y = MARGIN
    for level in reversed(range(len(floors))):
        bottom = _draw_floor(shapes, floors[level], COLOURS[level], y)
        spans[level] = (y, bottom)
        y = bottom + GAP
    _draw_imports(shapes, floors, spans)
    note = "An arrow leads from a floor to a floor that it imports; thin: under 5 pairs of files, thick: 20 and more. "
    note += "In a box, → names neighbours that it imports."
    shapes.append(_text(MARGIN, y + LINE, note, colour="#475569"))
    height = round(y + 2 * LINE)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" {FONT}>'
    return "\n".join([opening, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *shapes, "</svg>", ""])


def _draw_floor(shapes: list[str], floor: Floor, colour: str, top: float) -> float:
    """Append a floor that begins at ``top``; returns where it ends."""
    rows = -(-len(floor.boxes) // 4)
    columns = -(-len(floor.boxes) // rows)
    area = WIDTH - BUS - MARGIN - LABEL - GAP
    drawn: list[str] = []
    y = top + GAP
    for row in (floor.boxes[i : i + columns] for i in range(0, len(floor.boxes), columns)):
        width = (area - (len(row) - 1) * GAP) / len(row)
        contents = [list(_lines(box, width, alone=len(floor.boxes) == 1)) for box in row]
        height = max(LINE * len(content) for content in contents) + TITLE + 20
        for place, (box, content) in enumerate(zip(row, contents, strict=True)):
            x = MARGIN + LABEL + place * (width + GAP)
            drawn.append(_rect(x, y, width, height, fill="white", stroke=colour))
            drawn.append(_text(x + 10, y + 8 + TITLE, box.title, size=TITLE, weight="bold", colour=colour))
            for number, (line, shade) in enumerate(content):
                drawn.append(_text(x + 10, y + 12 + TITLE + LINE * (number + 1) - 2, line, colour=shade))
        y += height + GAP
    shapes.append(_rect(MARGIN, top, WIDTH - BUS - MARGIN, y - top, fill=colour, opacity=0.08))
    shapes.append(_text(MARGIN + 14, (top + y) / 2 + 5, floor.name, size=TITLE, weight="bold", colour=colour))
    shapes += drawn
    return y


def _lines(box: Box, width: float, *, alone: bool) -> Iterator[tuple[str, str]]:
    """Lines of text under a box's title, each with its colour; a box that is alone on its floor names its files."""
    fit = int((width - 20) / (0.56 * TEXT))  # characters, counted for the widest of the fonts
    yield from ((line, "#1e293b") for line in _shorten(box.purpose, fit))
    if alone:
        yield from ((line, "#64748b") for line in textwrap.wrap(" · ".join(box.files), fit, break_on_hyphens=False))
    elif box.files:
        yield f"{len(box.files)} files" if len(box.files) > 1 else "1 file", "#64748b"
    if box.neighbours:
        yield from ((line, "#64748b") for line in textwrap.wrap("→ " + ", ".join(box.neighbours), fit))


def _shorten(text: str, fit: int) -> list[str]:
    """``text`` in at most three lines; a longer one ends at a pause, at a colon rather than a comma."""
    lines = textwrap.wrap(text, fit, break_on_hyphens=False)
    if len(lines) <= 3:
        return lines
    start = " ".join(lines[:3])
    pauses = [found.start() for found in re.finditer(r"[:;]", start[20:])]  # a shorter start would mean too little
    end = 20 + pauses[0] if pauses else start.rfind(",")
    return textwrap.wrap(start[:end] if end > 0 else start.rpartition(" ")[0] + " …", fit, break_on_hyphens=False)


def _draw_imports(shapes: list[str], floors: list[Floor], spans: dict[int, tuple[float, float]]) -> None:
    """A vertical lane for each floor that imports, in its colour, with an arrow into each floor that it imports."""
    edge = WIDTH - BUS
    importers = {to: [level for level, floor in enumerate(floors) if to in floor.imports] for to in spans}
    for level, floor in enumerate(floors):
        if not floor.imports:
            continue
        colour, lane = COLOURS[level], edge + 40 + LANE * (level - 1)
        out = _slot(spans[level], 0, len(importers[level]))
        ends = {to: _slot(spans[to], 1 + importers[to].index(level), len(importers[to])) for to in floor.imports}
        last = max(ends.values())
        shapes.append(_path(f"M{edge} {out:.1f}H{lane - 8}q8 0 8 8V{last - 8:.1f}q0 8 -8 8", colour))
        shapes.append(f'<circle cx="{edge}" cy="{out:.1f}" r="4" fill="{colour}"/>')
        for to, y in sorted(ends.items()):
            start = lane - 7 if y == last else lane
            shapes.append(_path(f"M{start} {y:.1f}H{edge + 8}", colour, width=_thickness(floor.imports[to])))
            shapes.append(f'<path d="M{edge + 1} {y:.1f}l11 -6v12z" fill="{colour}"/>')


def _thickness(pairs: int) -> float:
    """In classes, so that one import more seldom changes the picture."""
    return 1.2 if pairs < 5 else 2.5 if pairs < 20 else 4.5


def _slot(span: tuple[float, float], number: int, count: int) -> float:
    """Where arrow ``number`` meets a floor's right edge: 0 leaves it, 1 .. ``count`` arrive, nearest floor first."""
    top, bottom = span
    return top + (bottom - top) * (number + 0.75) / (count + 1.25)


def _rect(
    x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", opacity: float = 1
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" fill-opacity="{opacity}"/>'
    )


def _text(x: float, y: float, text: str, *, colour: str, size: int = TEXT, weight: str = "normal") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text, quote=False)}</text>'


def _path(line: str, colour: str, *, width: float = 2) -> str:
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def main() -> None:
    PICTURE.write_text(draw(read_floors(ROOT, checker())), encoding="utf-8")


if __name__ == "__main__":
    main()
