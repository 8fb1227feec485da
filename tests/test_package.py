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
from pathlib import Path

import pytest

import sksoup

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sksoup"
# imports run from later entries to earlier ones only; a tuple sits side by side
PLAN = [
    "exceptions",
    "_on_demand",
    "_ranks",
    "_memory",
    "_budget",
    "_formats",
    "_memo",
    "_hub",
    "_sources",
    "_describe",
    "checkpoints",
    "_layout",
    "_mix",
    "_data",
    "_loaders",
    "_objective",
    "_batch_norm",
    "_evaluation",
    "_problem",
    "_reader",
    "_model_batch",
    "_descent",
    "recipe",
    "_displays",
    "_report",
    "_base",
    ("baselines", "greedy"),
    ("learned", "mehl"),  # MEHL-Soup may start at the greedy soup
    "datasets",
    "model_selection",
    "_barrier",
    "_comparison",
    "inspection",
    "__main__",
]
LEVEL = {
    name: level
    for level, names in enumerate(PLAN)
    for name in ((names,) if isinstance(names, str) else names)
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FOLDERS = [path.parent.name for path in PACKAGE.glob("*/**/*.py")]
CORE = set(list(LEVEL)[: list(LEVEL).index("_displays")])


def imports_of(source: str) -> list[tuple[str, int]]:
    """(module, relative level) of every import in a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(name, node.level) for name in names if name]
            if node.module and not node.level:
                found += [(f"{node.module}.{alias.name}", 0) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    inside = [name for name, level in imports_of(source) if level]
    inside += [
        name.split(".")[1] for name, level in imports_of(source)
        if not level and name.startswith("sksoup.")
    ]  # fmt: skip
    inside = [name for name in inside if name != "__version__"]  # of the package itself
    return [name for name in inside if LEVEL.get(name, 99) >= LEVEL[module]]


def test_every_module_has_its_place_in_the_plan():
    unplaced, gone = set(MODULES) - set(LEVEL), set(LEVEL) - set(MODULES)
    assert not unplaced, f"give {sorted(unplaced)} a place in PLAN, in tests/test_package.py"
    assert not gone, f"PLAN lists {sorted(gone)}, which the package does not have"
    assert not FOLDERS, f"the package is flat, so that PLAN covers all of it; found {FOLDERS}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert wrong_imports(module, (PACKAGE / f"{module}.py").read_text()) == []


def test_the_check_of_imports_can_fail():
    assert wrong_imports("_mix", "from .greedy import GreedySoup") == ["greedy"]
    assert wrong_imports("greedy", "def f():\n    from . import mehl") == ["mehl"]
    assert wrong_imports("_mix", "from ._layout import Layers") == []
    assert wrong_imports("_mix", "from sksoup.mehl import MEHLSoup") == ["mehl", "mehl"]
    assert wrong_imports("mehl", "from sksoup._mix import mix") == []


@pytest.mark.parametrize("module", MODULES)
def test_only_public_names_of_scikit_learn_and_none_in_the_core(module):
    names = [name for name, _ in imports_of((PACKAGE / f"{module}.py").read_text())]
    learn = [name for name in names if name.split(".")[0] == "sklearn"]
    assert [name for name in learn if any(part.startswith("_") for part in name.split("."))] == []
    if module in CORE:
        assert learn == []


@pytest.mark.parametrize("module", MODULES)
def test_no_prints_no_asserts_one_opener_of_files(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert ("print" in called) == (module == "__main__")  # the command line alone speaks
    if module != "_formats":
        assert not called & {"torch.load", "torch.save", "safe_open", "save_file"}


@pytest.mark.parametrize("name", sksoup.__all__)
def test_public_names_are_documented(name):
    assert getattr(sksoup, name).__doc__
    assert re.search(rf"^    {name}$", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "module", ["checkpoints", "datasets", "inspection", "model_selection", "recipe"]
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
