"""Check the built site: every link, picture and script within it leads somewhere.

    python docs/check_links.py docs/_build/html [--online]

Anchors count. Links to other sites are only tried with --online.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and what in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(root: Path) -> tuple[list[str], set[str]]:
    """What leads nowhere, and the links that leave the site."""
    files = (path for path in sorted(root.rglob("*.html")) if "_static" not in path.parts)
    pages = {path.resolve(): Page(path) for path in files}
    if not pages:
        sys.exit(f"{root} holds no pages: run make docs first.")
    found, outside = [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                outside.add(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                found.append(f"{path.relative_to(root.resolve())}: {link}")
    return found, outside


def unreachable(link: str) -> str | None:
    """Why a page of another site can't be had; None if it can."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except (urllib.error.URLError, TimeoutError) as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--online", action="store_true")
    options = parser.parse_args()
    found, outside = broken(options.site)
    if options.online:
        found += [f"{link}: {why}" for link in sorted(outside) if (why := unreachable(link))]
    if found:
        sys.exit("Links that lead nowhere:\n" + "\n".join(found))
    print(f"all links within {options.site} lead somewhere; {len(outside)} lead to other sites")


if __name__ == "__main__":
    main()
