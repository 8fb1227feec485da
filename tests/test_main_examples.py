"""The examples of every --help run, and the documentation's page has every command and option."""

from __future__ import annotations

import importlib
import json
import shlex
import sys

import pytest
from safetensors import safe_open

from sksoup.__main__ import main
from sksoup.cli.examples import EXAMPLES
from sksoup.cli.parser import COMMANDS, build_parser

from .command_zoo import make_folder, transformers
from .pages import DOCS, read


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return tmp_path


def test_every_example_runs_as_it_stands(folder, capsys):
    assert EXAMPLES.keys() == COMMANDS.keys()
    for name, lines in EXAMPLES.items():
        assert len(lines) >= 2
        for line in lines:
            program, *arguments = shlex.split(line.replace("\\\n", " "))
            assert (program, arguments[0]) == ("sksoup", name)
            assert main(arguments) == 0, (line, capsys.readouterr())
    model = transformers.AutoModelForSequenceClassification.from_pretrained("soup")
    assert model.config.id2label[1] == "positive"
    for name in ("soup", "mean", "sharded", "stock"):
        assert len(transformers.AutoTokenizer.from_pretrained(name)) > 5
        assert transformers.AutoModelForSequenceClassification.from_pretrained(name)
    with safe_open("weighted/model-00001-of-00001.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in list(file.keys())} == {"BF16"}
    capsys.readouterr()
    for soup, sources in [
        ("soup", "runs"), ("learned", "runs"), ("mehl", "runs"), ("weighted", "runs"),
        ("sharded", "runs"), ("greedy.safetensors", "nets"), ("learned.safetensors", "nets"),
        ("mehl.safetensors", "nets"), ("f1.safetensors", "nets"),
    ]:  # fmt: skip
        assert main(["verify", soup, sources, "--json"]) == 0, capsys.readouterr()
        assert json.loads(capsys.readouterr().out)["ok"]


def test_help_shows_the_examples_and_the_exit_status(capsys):
    for name, lines in EXAMPLES.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert all(line in shown for line in lines)
        assert "held-out" not in shown
    text = build_parser().format_help()
    assert "2  usage or input error (message on stderr)" in text
    assert "No code in a pickle is run." in text


def test_the_page_has_every_command_with_its_options_and_examples(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS)
    rendered = importlib.import_module("command_line")
    page = read("cli")
    directives = [line.split()[-1] for line in page.splitlines() if "sksoup-command::" in line]
    assert directives == [*COMMANDS]
    for name, lines in EXAMPLES.items():
        text = rendered.page_of(name)
        assert all(line.split("\n")[0] in text for line in lines)
        actions = [a for a in rendered.parser_of(name)._actions if a.dest != "help"]
        assert len(actions) > 5
        for action in actions:
            first = (action.option_strings or [action.metavar])[0]
            assert f".. option:: {first}" in text
            assert action.help.split()[-1].strip("`") in text
    for option in ("--data", "--module", "--classes", "--shard-size", "--dtype", "--weights"):
        assert f"``{option}" in page
