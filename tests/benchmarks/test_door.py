"""``python -m benchmarks``: the list of the benchmarks, and one of them by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import trace
from benchmarks.__main__ import ROOT, main

HELPERS = {
    "__init__", "__main__", "language", "lora", "networks", "reference", "zoo",
    "paper.__init__", "paper.common", "paper.families", "photos", "shifts",
}  # fmt: skip


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
    main()


def test_the_list_names_every_benchmark_with_its_summary(monkeypatch, capsys):
    run(monkeypatch)
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()
                  if line.startswith("  "))  # fmt: skip
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    assert set(listed) == files - HELPERS
    assert listed["trace"] == trace.__doc__.splitlines()[0]
    assert all(summary.endswith(".") for summary in listed.values())


def test_listing_imports_no_benchmark():
    code = (
        "import sys; from benchmarks.__main__ import main; sys.argv = ['', '--help']; main();"
        "assert not {'torch', 'sksoup', 'benchmarks.zoo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True, capture_output=True)


def test_a_benchmark_gets_the_arguments_after_its_name(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(trace, "main", lambda: seen.append(sys.argv))
    run(monkeypatch, "trace", "--list", "more")
    assert seen == [["python -m benchmarks trace", "--list", "more"]]
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "paper.table_3", "--help")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks paper.table_3 [-h]")


@pytest.mark.parametrize(
    ("name", "hint"), [("cots", "'cost'"), ("tables_1_2", "'paper.tables_1_2'"), ("zoo", None)]
)
def test_an_unknown_name_is_refused(monkeypatch, capsys, name, hint):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, name)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"There is no benchmark {name!r}.")
    assert (f"Did you mean {hint}?" in said) if hint else ("Did you mean" not in said)
