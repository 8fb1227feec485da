"""The documentation: the check of its links, the order of the tutorials, words to search for."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHECK = DOCS / "check_links.py"


def check(site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_links_of_a_site(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a picture.png").touch()
    (tmp_path / "index.html").write_text(
        "<h1 id='top'>x</h1><a href='sub/other.html#there'></a><a href='#top'></a>"
        "<img src='a%20picture.png'><a href='https://example.org/'></a><a href='mailto:a@b.c'></a>"
    )
    (tmp_path / "sub" / "other.html").write_text("<p id='there'></p><a href='../index.html'></a>")
    found = check(tmp_path)
    assert found.returncode == 0
    assert "1 lead to other sites" in found.stdout
    (tmp_path / "sub" / "other.html").write_text("<a href='gone.html'></a>")
    found = check(tmp_path)
    assert found.returncode == 1
    assert found.stderr.splitlines()[1:] == [
        "index.html: sub/other.html#there",
        "sub/other.html: gone.html",
    ]


def test_a_site_that_is_not_built(tmp_path):
    found = check(tmp_path)
    assert found.returncode == 1
    assert "run make docs first" in found.stderr


def test_every_tutorial_has_a_place():
    order = runpy.run_path(str(DOCS / "teaching_order.py"))["ORDER"]
    assert sorted(order) == sorted(path.stem for path in (ROOT / "examples").glob("plot_*.py"))


def test_every_page_is_in_the_table_of_contents():
    listed = {
        entry
        for page in DOCS.glob("*.rst")
        for tree in re.findall(r"\.\. toctree::\n((?:    .*\n|\n)+)", page.read_text("utf-8"))
        for entry in tree.split()
    }
    pages = {path.stem for path in DOCS.glob("*.rst")} - {"index", "sg_execution_times"}
    assert pages <= listed


@pytest.mark.parametrize("word", ["LoRA", "diverged", "Trainer", "perplexity"])
def test_words_that_people_search_for_are_on_the_pages(word):
    pages = [path for path in DOCS.glob("*.rst") if path.name != "paper.rst"]
    assert sum(word in path.read_text("utf-8") for path in pages) >= 3
