"""The code that pages of the documentation show."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def read(page: str) -> str:
    return (DOCS / f"{page}.rst").read_text("utf-8")


def code_of(page: str) -> str:
    """The Python blocks of a page, one after the other."""
    text = read(page)
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text)
    assert len(blocks) == text.count("code-block:: python")
    return "\n".join(map(dedent, blocks))


def run(page: str, **given: Any) -> dict[str, Any]:
    """Run the code of a page as it stands; the names that it leaves."""
    found = dict(given)
    exec(compile(code_of(page), f"{page}.rst", "exec"), found)
    return found
