# SPDX-License-Identifier: Apache-2.0
"""What users install: the wheel, a wheel made from the sdist, an editable install. Each is used from another directory.

Builds go without isolation and installs without dependencies, into environments that see the present packages through a
.pth file; a path added that way brings no editable install of ours along.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from fastreid_u import _env

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("scikit_build_core", reason="needs scikit-build-core: pip install -e '.[test]'")
pytest.importorskip("pybind11", reason="needs pybind11: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a source checkout around it")

# Run by the interpreter under test; prints what it found.
LOOK = """
import importlib.metadata as metadata, json, torch
import fastreid_u, fastreid_u.kernels
from fastreid_u import _env, _ext
from fastreid_u.ops import _compiled
about = metadata.metadata("fastreid-u")
line = torch.tensor([0.0, 0.1, 0.2, 5.0])
print(json.dumps({
    "package": fastreid_u.__file__,
    "core": _ext.core().__file__,
    "cuda": _ext.core().built_with_cuda,
    "kernels": list(fastreid_u.kernels.__path__),
    "kernels_file": getattr(fastreid_u.kernels, "__file__", None),
    "cuda_source": sorted(path.name for path in _compiled.source_folder().iterdir()),
    "tested": _env._tested_versions(),
    "labels": fastreid_u.dbscan((line[:, None] - line).abs(), 0.15, 2, backend="cpp").tolist(),
    "version": fastreid_u.__version__,
    "license": about["License-Expression"],
    "python": about["Requires-Python"],
    "readme": about["Description-Content-Type"],
    "extras": sorted(about.get_all("Provides-Extra")),
    "scripts": [e.value for e in metadata.distribution("fastreid-u").entry_points if e.name == "fastreid-u"],
}))
"""


def call(
    *command: object, cwd: Path = ROOT, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with no PYTHONPATH and with the given variables; show its output if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def pip_build(kind: list[object], build: Path, cuda: str = "OFF", **environment: str) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    # Unoptimised, because compiling is most of these tests' time; CMake adds no other flag for "None".
    flags = ("--no-build-isolation", "--no-deps", "-C", f"build-dir={build}", "-C", "cmake.build-type=None")
    call(*pip, *kind, *flags, FASTREID_U_CUDA=cuda, **environment)


def environment(folder: Path) -> Path:
    """A new virtual environment that sees the packages of this one; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "outer.pth").write_text("\n".join(outer) + "\n")
    return folder / "bin" / "python"


def look(python: Path, folder: Path) -> dict:
    return json.loads(call(python, "-c", LOOK, cwd=folder).stdout)


def device_source() -> list[str]:
    """Files of csrc/ that the kernels consist of."""
    found, waiting = set(), ["device.cuh", "pseudo_labels.h"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r'#include "(.*)"', (ROOT / "csrc" / name).read_text())
    return sorted(found)


def require_sound(seen: dict, python: Path) -> None:
    """What holds for every way of installing."""
    assert Path(seen["core"]).is_relative_to(python.parents[1]), "the compiled module of another install was found"
    assert seen["cuda"] is False
    assert seen["kernels_file"] is None, "kernels/ must stay a namespace package"
    assert seen["labels"] == [0, 0, 0, -1]
    assert seen["cuda_source"] == device_source(), "CuPy compiles what lies next to the module"
    assert seen["tested"] == pins()
    assert seen["license"] == "Apache-2.0"
    assert seen["python"] == ">=3.11"
    assert seen["readme"] == "text/markdown"
    assert {"cupy", "faiss", "faiss-gpu", "infomap", "timm", "test", "dev"} <= set(seen["extras"])
    assert seen["scripts"] == ["fastreid_u.cli:main"]
    declared = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert f'"{seen["version"]}"' in declared


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().replace("_", "-").lower().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def wheel(work: Path) -> Path:
    pip_build(["wheel", ".", "-w", work / "wheel"], work / "build")
    (built,) = (work / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(work: Path) -> Path:
    """The sdist, unpacked."""
    code = "import sys, scikit_build_core.build as backend; backend.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", code, work / "sdist")
    (archive,) = (work / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    return folder


def install(python: Path, wheel: Path) -> None:
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)


def test_wheel(work: Path, wheel: Path) -> None:
    python = environment(work / "from_wheel")
    install(python, wheel)
    seen = look(python, work)
    require_sound(seen, python)
    assert Path(seen["package"]).is_relative_to(work / "from_wheel")
    assert all(Path(folder).is_relative_to(work / "from_wheel") for folder in seen["kernels"])
    assert "usage" in call(work / "from_wheel" / "bin" / "fastreid-u", "--help", cwd=work).stdout.lower()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"fastreid_u", next(top for top in tops if top.endswith(".dist-info"))}
    sources = {f"fastreid_u/{path.relative_to(ROOT / 'fastreid_u')}" for path in (ROOT / "fastreid_u").rglob("*.py")}
    sources |= {f"fastreid_u/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert sources <= set(names)
    assert "fastreid_u/kernels/__init__.py" not in names
    assert {f"fastreid_u/csrc/{name}" for name in device_source()} <= set(names)
    assert not any(name.endswith((".cpp", ".cu")) for name in names), "what is compiled already stays at home"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(work: Path, wheel: Path, unpacked: Path) -> None:
    expected = {"csrc", "kernels", "fastreid_u", "tests", "CMakeLists.txt", "LICENSE"}
    assert expected <= {path.name for path in unpacked.iterdir()}
    assert not list(unpacked.rglob("*.so"))
    pip_build(["wheel", unpacked, "-w", work / "wheel_of_sdist"], work / "build_of_sdist")
    (built,) = (work / "wheel_of_sdist").glob("*.whl")
    with zipfile.ZipFile(built) as ours, zipfile.ZipFile(wheel) as direct:
        assert sorted(ours.namelist()) == sorted(direct.namelist())
    python = environment(work / "from_sdist")
    install(python, built)
    require_sound(look(python, work), python)


def test_editable_install_follows_the_sources(work: Path, unpacked: Path) -> None:
    python = environment(work / "from_editable")
    pip_build(["--python", python, "install", "-e", unpacked], work / "build_of_sdist")
    seen = look(python, work)
    require_sound(seen, python)
    assert Path(seen["package"]).is_relative_to(unpacked)
    assert seen["kernels"] == [str(unpacked / "kernels")]
    (unpacked / "kernels" / "born_later.py").write_text("ANSWER = 42\n")
    (unpacked / "fastreid_u" / "born_later.py").write_text("ANSWER = 43\n")
    code = "import fastreid_u.born_later as a, fastreid_u.kernels.born_later as b; print(a.ANSWER, b.ANSWER)"
    assert call(python, "-c", code, cwd=work).stdout == "43 42\n"


@pytest.mark.skipif(not _env.nvcc().present, reason=f"no nvcc: {_env.nvcc().detail}")
def test_cuda_build_imports_without_a_driver(work: Path) -> None:
    """One architecture, to be quick. The runtime is linked statically, so the module needs no libcudart."""
    pip_build(["wheel", ".", "-w", work / "cuda"], work / "build_cuda", cuda="ON", CUDAARCHS="90")
    (built,) = (work / "cuda").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if Path(name).name.startswith("_C."))
        core = Path(archive.extract(name, work / "cuda_core"))
    code = "import _C; print(_C.built_with_cuda, hasattr(_C, 'dbscan_cuda'), hasattr(_C, 'pseudo_labels_cuda'))"
    assert call(sys.executable, "-c", code, cwd=core.parent).stdout == "True True True\n"
    needed = call("ldd", core).stdout if shutil.which("ldd") else ""
    assert "libcudart" not in needed
    assert "libcuda." not in needed


def configure(folder: Path, setting: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake") or pytest.skip("no cmake on PATH")
    define = ("-DSKBUILD_PROJECT_NAME=fastreid_u", "-DSKBUILD_PROJECT_VERSION=0", f"-DFASTREID_U_CUDA={setting}")
    return call(cmake, "-S", ROOT, "-B", folder, *define, check=False, **environment)


@pytest.mark.skipif(not _env.nvcc().present, reason=f"no nvcc: {_env.nvcc().detail}")
def test_architectures_follow_the_environment_in_a_used_build_folder(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    for named, flag in (("", "all-major"), ("90-real", "sm_90"), ("", "all-major"), ("80-real", "sm_80")):
        done = configure(tmp_path, "ON", CUDAARCHS=named, pybind11_DIR=pybind11, CMAKE_GENERATOR="Unix Makefiles")
        assert done.returncode == 0, done.stderr
        assert flag in (tmp_path / "CMakeFiles" / "_C.dir" / "flags.make").read_text()


def test_requiring_cuda_without_nvcc_is_a_clear_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "ON", CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert done.returncode != 0
    assert "FASTREID_U_CUDA=ON, but no working nvcc was found" in done.stderr


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "MAYBE")
    assert done.returncode != 0
    assert "FASTREID_U_CUDA must be AUTO, ON or OFF, got MAYBE" in done.stderr


def test_every_declared_package_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in declared:
        name, least = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?", requirement).groups()
        assert _env._release(pins()[name]) >= _env._release(least or "0"), requirement
    first = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert re.search(r"last run with: \d{4}-\d\d-\d\d, Python 3\.\d+", first)


def test_make_installs_the_tested_versions_and_pip_alone_need_not() -> None:
    def recipe(target: str) -> str:
        return call("make", "--always-make", "--dry-run", target).stdout

    assert all("pip install --quiet -c constraints.txt -e" in recipe(target) for target in ("demo", "test"))
    assert "-c constraints.txt" not in recipe("test-newest")
    assert "constraints.txt" not in (ROOT / "pyproject.toml").read_text()


def test_ci_runs_both_passes_and_either_fails_it(tmp_path: Path) -> None:
    """With a ``make`` that only takes notes, and fails where it is told to."""
    (tmp_path / "make").write_text('#!/bin/sh\necho "asked for $1"\ntest "$1" != "$FAILING"\n')
    (tmp_path / "make").chmod(0o755)
    shutil.copytree(ROOT / ".ci", tmp_path / "tree" / ".ci")
    for failing, shown in (("", "none"), ("test", "tested"), ("test-newest", "newest")):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = call(tmp_path / "tree" / ".ci" / "run", cwd=tmp_path, check=False, PATH=path, FAILING=failing)
        assert (done.returncode == 0) is (failing == "")
        lines = done.stdout.splitlines()
        assert [line for line in lines if not line.startswith("====")] == ["asked for test", "asked for test-newest"]
        assert lines[-1] == f"==== failed passes: {shown}"


def test_linter_is_pinned_alike() -> None:
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    hook = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n\s+rev: v([\d.]+)", hook)[1] == pinned
