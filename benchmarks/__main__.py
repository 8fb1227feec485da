"""List the benchmarks, or run one by name.

python -m benchmarks
python -m benchmarks NAME [options]     # -h after a name: its options
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent
GROUPS = {"Cost and behavior": ROOT, "The papers' tables": ROOT / "paper"}
USAGE = "usage: python -m benchmarks NAME [options]     (-h after a name: its options)"


def scripts(folder: Path) -> dict[str, str]:
    """Names of the modules in a folder that can be run -> the first lines of their docstrings.

    Modules are read, not imported.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
        if "__name__ == '__main__'" in tests and path.name != "__main__.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    groups = {title: scripts(folder) for title, folder in GROUPS.items()}
    name, arguments = (sys.argv[1:2] or ["-h"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE)
        for title, found in groups.items():
            print(f"\n{title}\n")
            print("\n".join(f"  {each:20}  {summary}" for each, summary in found.items()))
        return
    names = [each for found in groups.values() for each in found]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        print(f"There is no benchmark {name!r}.{hint} python -m benchmarks lists all {len(names)}.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    sys.argv = [f"python -m benchmarks {name}", *arguments]  # what argparse shows, what it reads
    importlib.import_module(f"{__package__}.{name}").main()


if __name__ == "__main__":
    main()
