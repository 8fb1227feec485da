"""What is released is checked, and the workflows of a public forge run the same commands."""

from __future__ import annotations

import importlib.util
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from sksoup import __version__

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

ZOO = {f"sksoup/reference_zoo/ft{k:02d}.safetensors" for k in range(check.ZOO)}
TRACKED = {"README.md", "tests/data.pt", "sksoup/__init__.py", *check.IN_WHEEL, *ZOO}
INFO = f"sksoup-{__version__}.dist-info"


def metadata(**other: str) -> str:
    fields = {"Version": __version__, "License-Expression": "BSD-3-Clause",
              "Requires-Python": ">=3.11", **other}  # fmt: skip
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n# readme\n"


def make_sdist(folder: Path, names: set[str]) -> Path:
    with tarfile.open(folder / "sksoup.tar.gz", "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"sksoup-{__version__}/{name}"), io.BytesIO())
    return folder / "sksoup.tar.gz"


def make_wheel(folder: Path, names: set[str]) -> Path:
    with zipfile.ZipFile(folder / "sksoup.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr(f"{INFO}/METADATA", metadata())
    return folder / "sksoup.whl"


def test_the_source_distribution_is_what_is_committed(tmp_path):
    check.check_sdist(make_sdist(tmp_path, TRACKED | {"PKG-INFO"}), TRACKED | {".gitignore"})
    with pytest.raises(SystemExit, match=r"lacks \['tests/data.pt'\]"):
        check.check_sdist(make_sdist(tmp_path, TRACKED - {"tests/data.pt"}), TRACKED)
    with pytest.raises(SystemExit, match=r"files of no commit: \['secret'\]"):
        check.check_sdist(make_sdist(tmp_path, TRACKED | {"secret"}), TRACKED)


def test_the_wheel_holds_the_package_the_licence_and_the_zoo(tmp_path):
    names = {name for name in TRACKED if name.startswith("sksoup/")} | {f"{INFO}/licenses/LICENSE"}
    assert check.check_wheel(make_wheel(tmp_path, names), TRACKED)["Version"] == __version__
    for name, match in (
        ("sksoup/__init__.py", "does not hold the files"),
        (f"{INFO}/licenses/LICENSE", "lacks .*LICENSE"),
    ):
        with pytest.raises(SystemExit, match=match):
            check.check_wheel(make_wheel(tmp_path, names - {name}), TRACKED)
    for name, match in (("sksoup/py.typed", "lacks sksoup/py.typed"), (min(ZOO), "has 23")):
        with pytest.raises(SystemExit, match=match):
            check.check_wheel(make_wheel(tmp_path, names - {name}), TRACKED - {name})


def test_the_metadata_is_that_of_this_version():
    def message(**other: str) -> object:
        return check.email.message_from_string(metadata(**other))

    check.check_metadata(message(), "# readme")
    for other, match in (
        ({"Version": "9"}, "of version 9"),
        ({"License-Expression": "MIT"}, "licence"),
        ({"Requires-Python": ">=2"}, "Requires-Python"),
    ):
        with pytest.raises(SystemExit, match=match):
            check.check_metadata(message(**other), "# readme")
    with pytest.raises(SystemExit, match="description"):
        check.check_metadata(message(), "# another")


def test_a_command_that_fails_is_shown():
    with pytest.raises(SystemExit, match="failed:\nshown"):
        check.run("bash", "-c", "echo shown; exit 3")


def test_the_workflows_run_the_commands_of_the_repository():
    yaml = pytest.importorskip("yaml")
    ci, release = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
        for name in ("ci", "release")
    )
    (job,) = ci["jobs"].values()
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    tested = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)
    assert tested
    assert set(tested) <= set(job["strategy"]["matrix"]["python"])
    assert len(job["strategy"]["matrix"]["system"]) == 2
    assert {"run": ".ci/run"} in job["steps"]
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert {"run": "make release-check"} in build["steps"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}  # trusted publishing, no password
    assert "secrets." not in str(release)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^release-check: wheel .*\n\t.*release_check.py dist$", makefile, re.M)
