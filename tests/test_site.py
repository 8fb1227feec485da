"""The check of the documentation's links finds what is broken, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[1] / "docs" / "check_links.py"


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
