# SPDX-License-Identifier: Apache-2.0
"""The docs: links lead somewhere, methods and public names have their place, the picture shows today's imports."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastreid_u

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs a source checkout around it")

# Say who does what: no riddles about who, and no thing that speaks.
UNCLEAR = re.compile(
    r"\b(nobody|somebody|everybody|whoever|whom"
    r"|(says|said|told|tells|answers|asks) (so|what|which|who|why|how|whether|nothing)|(is|are|was|were) told)\b",
    re.IGNORECASE,
)


def pages(root: Path = ROOT) -> list[Path]:
    return [*root.glob("*.md"), *sorted((root / "docs").rglob("*.md")), *root.glob("kernels/*.md")]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root: Path) -> list[str]:
    found = []
    for page in pages(root):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            goal = page.parent / path if path else page
            if re.match(r"\w+:", target):
                continue
            if not goal.exists() or (anchor and anchor not in anchors(goal)):
                found.append(f"{page.relative_to(root)}: {target}")
    return found


def test_links_lead_somewhere():
    assert len(pages()) > 20
    assert broken_links(ROOT) == []


def test_a_planted_broken_link_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("# There\n\n## A `b`: c + d\n")
    good = "[a](docs/there.md) [b](docs/there.md#a-b-c--d) [c](https://a.example/b.md)"
    (tmp_path / "README.md").write_text(f"{good} [d](docs/gone.md) [e](docs/there.md#e)")
    assert broken_links(tmp_path) == ["README.md: docs/gone.md", "README.md: docs/there.md#e"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_say_who_does_what(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("a record of the past")
    lines = without_code(page.read_text()).splitlines()
    assert [line for line in lines if UNCLEAR.search(line)] == []


@pytest.mark.parametrize("name", fastreid_u.methods())
def test_every_method_has_a_page(name):
    index = (DOCS / "methods" / "README.md").read_text()
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# `{name}`: ")
    for part in ("**The idea.**", "**Published**", "**What we verified.**", "**On rendered people**"):
        assert part in page
    assert index.count(f"]({name}.md)") == 1
    assert len(re.findall(rf"^\| `{name}` \|", index, re.MULTILINE)) == 1


def test_every_page_of_a_method_has_a_method():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {*fastreid_u.methods(), "README"}


def test_every_public_name_is_in_the_docs():
    text = "".join(page.read_text() for page in pages())
    assert [name for name in fastreid_u.__all__ if not re.search(rf"(?<!\w){name}(?!\w)", text)] == []
    ops = (DOCS / "ops.md").read_text()
    public = [name for name in fastreid_u._HOME if re.match(r"ops|memory", fastreid_u._HOME[name])]
    assert [name for name in public if f"`{name}" not in ops] == []


def test_every_quirk_is_told_once():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (DOCS / "quirks.md").read_text(), re.MULTILINE)
    points = [point for point, *_ in rows if point not in ("point", "---")]
    assert len(points) > 50
    assert len(set(points)) == len(points)


@pytest.fixture(scope="module")
def drawing():
    """The script that draws the picture, as a module."""
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_imports(drawing):
    drawn = drawing.draw(drawing.read_floors(ROOT, drawing.checker()))
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawn, "run python docs/draw_architecture.py"


def test_the_picture_shows_an_import_and_refuses_a_module_without_a_floor(drawing, tmp_path):
    files = {
        "__init__.py": "",
        "ops/__init__.py": '"""Ops. More."""',
        "ops/knn.py": "from fastreid_u.cpu import knn",
        "ops/_hidden.py": "",
        "cpu/__init__.py": '"""On a CPU."""',
        "cpu/knn.py": "",
        "recipe.py": '"""A method."""\nfrom fastreid_u.data import x',
        "data/__init__.py": '"""Data."""',
    }
    for name, text in files.items():
        (tmp_path / "fastreid_u" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fastreid_u" / name).write_text(text)
    floors = {floor.name: floor for floor in drawing.read_floors(tmp_path, drawing.checker())}
    assert floors["ops"].boxes == [drawing.Box("ops/", "Ops", ["knn"], [])]
    assert floors["ops"].imports == {0: 1}
    assert drawing.Box("recipe.py", "A method", [], ["data/"]) in floors["parts"].boxes
    (tmp_path / "fastreid_u" / "homeless.py").write_text("")
    with pytest.raises(ValueError, match="must be on a floor, got homeless"):
        drawing.read_floors(tmp_path, drawing.checker())


def test_what_the_page_of_the_architecture_names_exists():
    """Backticked paths, from the root or from the package; `path: name` is a name in that file."""
    missing = []
    for path, name in re.findall(r"`((?:[\w.]+/)+(?:[\w.]+)?)(?:: (\w+))?`", (DOCS / "architecture.md").read_text()):
        goal = ROOT / path if (ROOT / path).exists() else ROOT / "fastreid_u" / path
        if not goal.exists() or (name and not re.search(rf"(def|class) {name}\b", goal.read_text())):
            missing.append(f"{path}: {name}" if name else path)
    assert missing == []
