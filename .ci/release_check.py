"""Check what would be released: the files in a folder that ``python -m build`` made.

    python .ci/release_check.py dist

Contents and metadata of the source distribution and of the wheel; then the wheel is installed into
an empty environment, without extras, where README's ten lines and the command line have to work.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.message import Message
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
ZOO = 24  # checkpoints of sksoup.datasets.load_digits_checkpoints
MAX_WHEEL = 5_000_000  # bytes
NOT_RELEASED = {".gitignore", ".pre-commit-config.yaml"}
IN_WHEEL = ("sksoup/py.typed", "sksoup/reference_zoo/SHA256SUMS")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dist", type=Path)
    dist = parser.parse_args().dist.resolve()
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    tracked = tracked_files()
    check_sdist(sdist, tracked)
    metadata = check_wheel(wheel, tracked)
    check_metadata(metadata, (ROOT / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        check_with_twine(Path(folder) / "twine", wheel, sdist)
        check_installed(Path(folder) / "empty", wheel, metadata["Version"])
    print(f"{wheel.name} and {sdist.name} can be released")


def tracked_files() -> set[str]:
    """The files under version control."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        sys.exit("The contents can only be compared in a git checkout.")
    return set(listed.stdout.split("\n")) - {""}


def check_sdist(sdist: Path, tracked: set[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = tracked - names - NOT_RELEASED
    require(not missing, f"{sdist.name} lacks {sorted(missing)[:5]}")
    more = names - tracked - {"", "PKG-INFO", ".gitignore"}
    require(not more, f"{sdist.name} has files of no commit: {sorted(more)[:5]}")


def check_wheel(wheel: Path, tracked: set[str]) -> Message:
    """The wheel's metadata, once its contents are those of the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(path).decode())
    info = str(PurePosixPath(path).parent)
    package = {name for name in names if not name.startswith(f"{info}/")}
    require(package == {name for name in tracked if name.startswith("sksoup/")},
            f"{wheel.name} does not hold the files of sksoup/ as they are committed")  # fmt: skip
    for name in (*IN_WHEEL, f"{info}/licenses/LICENSE"):
        require(name in names, f"{wheel.name} lacks {name}")
    zoo = [name for name in names if re.fullmatch(r"sksoup/reference_zoo/ft\d+\.safetensors", name)]
    require(len(zoo) == ZOO, f"{wheel.name} has {len(zoo)} checkpoints, expected {ZOO}")
    size = wheel.stat().st_size
    require(size <= MAX_WHEEL, f"{wheel.name} has {size:,} bytes, at most {MAX_WHEEL:,} expected")
    print(f"{wheel.name}: {len(names)} files, {size:,} bytes")
    return metadata


def check_metadata(metadata: Message, readme: str) -> None:
    from sksoup import __version__

    require(metadata["Version"] == __version__, f"the wheel is of version {metadata['Version']}")
    require(metadata["License-Expression"] == "BSD-3-Clause", "the licence is not BSD-3-Clause")
    require(metadata["Requires-Python"] == ">=3.11", "Requires-Python is not >=3.11")
    require(str(metadata.get_payload()).strip() == readme.strip(), "its description is not README")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    require(re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", changes, re.M),
            f"CHANGELOG.md has no dated section of {__version__}")  # fmt: skip


def check_with_twine(environment: Path, *files: Path) -> None:
    """Whether the package index would accept and render the metadata."""
    python = make_environment(environment, "twine")
    run(python, "-m", "twine", "check", "--strict", *map(str, files))


def check_installed(environment: Path, wheel: Path, version: str) -> None:
    """Install into an empty environment; run README's ten lines and the command line there."""
    python = make_environment(environment, str(wheel))
    work = environment / "work"
    work.mkdir()
    extra = "import importlib.util as u; print([n for n in ('matplotlib', 'rich', 'transformers', "
    extra += "'peft', 'pytest') if u.find_spec(n)])"
    require(run(python, "-c", extra).strip() == "[]", "extras were installed")
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    code = next(text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if not language and "%" in text)
    printed = run(python, "-c", code, cwd=work)
    # a test in tests/test_readme.py compares the figures; here the processor is any
    require(re.sub(r"[\d.]+%", "", printed) == re.sub(r"[\d.]+%", "", shown),
            f"README's ten lines printed {printed!r}, expected {shown!r}")  # fmt: skip
    print(printed, end="")
    load = "from sksoup.datasets import load_digits_checkpoints as f; f('runs')"
    run(python, "-c", load, cwd=work)
    sksoup = python.with_name("sksoup")
    require(run(sksoup, "--version").strip() == f"sksoup {version}", "sksoup --version")
    run(sksoup, "inspect", "runs", cwd=work)
    run(sksoup, "average", "runs", "-o", "mean.safetensors", cwd=work)
    for soup in ("mean.safetensors", "soup.safetensors"):
        print(run(sksoup, "verify", soup, "runs", cwd=work).splitlines()[0])


def make_environment(folder: Path, package: str) -> Path:
    """An environment with one package and what it needs; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", str(ROOT / "constraints.txt"), package)  # fmt: skip
    return python


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; the check fails with all of it where the command does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd or "/", env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    require(
        not done.returncode, f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def require(holds: object, message: str) -> None:
    if not holds:
        sys.exit(f"Not ready for a release: {message}.")


if __name__ == "__main__":
    main()
