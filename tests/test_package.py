"""The package as a whole: imports run one way, everything public is documented, the wheel works."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

import sksoup

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sksoup"
CORE = ("checkpoints", "engine", "mixing", "runtime")  # no scikit-learn in here


def dotted(path: Path) -> str:
    """A file's name below the package: ``checkpoints.read``, ``checkpoints.__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> list[str]:
    """Full names of all that a text imports from elsewhere: modules, and names of modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def inside(name: str, source: str, files: Collection[str]) -> set[str]:
    """The files of the package that the text of a file imports."""
    found = [f for f in imported(source) if f.split(".")[0] == "sksoup"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = ["sksoup", *name.split(".")[:-1]]
            base = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    short = {one.removeprefix("sksoup").lstrip(".") for one in found}
    packages = {f"{one}.__init__".lstrip(".") for one in short} & set(files)
    return (short & set(files)) | packages - {"__init__"}  # of itself only the version is taken


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """What can be reached from itself."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), set(arrows.get(start, ()))
        while todo:
            one = todo.pop()
            seen.add(one)
            todo |= arrows.get(one, set()) - seen
        return seen

    return [name for name in arrows if name in reached(name)]


def arrows_of(texts: Mapping[str, str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Imports between files, and between the folders and files at the top of the package."""
    files = {name: inside(name, text, texts) - {name} for name, text in texts.items()}
    top: dict[str, set[str]] = {}
    for name, targets in files.items():
        here = name.split(".")[0]
        top.setdefault(here, set()).update({t.split(".")[0] for t in targets} - {here})
    return files, top


def test_imports_run_one_way_between_files_and_between_folders():
    files, top = arrows_of({name: path.read_text() for name, path in FILES.items()})
    assert sum(map(len, files.values())) > 50  # they were found
    assert circles(files) == []
    assert circles(top) == []


def test_the_check_of_imports_can_fail():
    texts = {
        "exceptions": "",
        "mixing.mix": "from ..exceptions import A",
        "recipes.greedy": "from ..mixing.mix import mix\nfrom .base import BaseSoup",
        "recipes.base": "def f():\n    from . import greedy",
        "mixing.card": "from sksoup.recipes.other import x",
        "recipes.other": "import torch",
    }
    files, top = arrows_of(texts)
    assert circles(files) == ["recipes.greedy", "recipes.base"]
    assert circles(top) == ["mixing", "recipes"]
    assert top["mixing"] == {"exceptions", "recipes"}


def test_every_folder_says_what_is_inside():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("name", FILES)
def test_only_public_names_of_scikit_learn_and_none_in_the_core(name):
    learn = [n for n in imported(FILES[name].read_text()) if n.split(".")[0] == "sklearn"]
    assert [n for n in learn if any(part.startswith("_") for part in n.split("."))] == []
    if name.split(".")[0] in CORE:
        assert learn == []


@pytest.mark.parametrize("name", FILES)
def test_no_prints_no_asserts_one_opener_of_files(name):
    tree = ast.parse(FILES[name].read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert ("print" in called) == (name == "__main__")  # the command line alone speaks
    if (
        name.split(".")[0] != "checkpoints" and name != "runtime.entries"
    ):  # a file each, for the cache
        assert not called & {"torch.load", "torch.save", "safe_open", "save_file", "load", "save"}
    assert not {"pickle.load", "pickle.loads", "joblib.load"} & called


@pytest.mark.parametrize("name", sksoup.__all__)
def test_public_names_are_documented(name):
    assert getattr(sksoup, name).__doc__
    assert re.search(rf"^    {name}$", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "module", ["base", "checkpoints", "datasets", "inspection", "model_selection", "recipe"]
)
def test_public_modules_are_documented(module):
    api = (ROOT / "docs" / "api.rst").read_text()
    for name in importlib.import_module(f"sksoup.{module}").__all__:
        assert re.search(rf"^    ({module}\.)?{name}$", api, re.MULTILINE), name


def test_the_commands_of_the_readme_exist_and_ci_runs_them():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in readme
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
        assert re.search(rf"^stage make {command}$", ci, re.MULTILINE)


def test_the_wheel_works_in_an_empty_environment(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sksoup/py.typed" in names
    assert "sksoup/reference_zoo/ft23.safetensors" in names
    assert {name.split("/")[0] for name in names} == {
        "sksoup",
        f"sksoup-{sksoup.__version__}.dist-info",
    }
    # an empty environment; the dependencies are lent to it, not installed a second time
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    purelib = sysconfig.get_path("purelib")
    program = (
        f"import sys; sys.path.append({purelib!r}); import sksoup; "
        "print(sksoup.__version__, sksoup.__file__)"
    )
    result = subprocess.run(
        [python, "-I", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    version, file = result.stdout.split()
    assert version == sksoup.__version__
    assert Path(file).is_relative_to(tmp_path / "env")
