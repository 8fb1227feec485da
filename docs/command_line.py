"""A directive that renders a command's help, so that the page and --help can't differ."""

from __future__ import annotations

import argparse
import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from sksoup.cli.examples import EXAMPLES
from sksoup.cli.parser import COMMANDS, build_parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    (commands,) = (a for a in build_parser()._actions if a.choices and not a.option_strings)
    found: argparse.ArgumentParser = commands.choices[command]
    return found


def page_of(command: str) -> str:
    """A command as reStructuredText: what it does, its usage, examples and options."""
    parser = parser_of(command)
    usage = f"sksoup {command} {COMMANDS[command].usage} [options]"
    lines = [_escaped(COMMANDS[command].description), "", *_code([usage]), "Examples:", ""]
    lines += [*_code(EXAMPLES[command]), f".. program:: sksoup {command}", ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if actions:
            lines += [f"*{group.title.capitalize()}*", ""]
        for action in actions:
            lines += [f".. option:: {_signature(action)}", "", f"    {_escaped(action.help)}", ""]
    return "\n".join(lines)


def _signature(action: argparse.Action) -> str:
    value = action.metavar or f"{{{','.join(action.choices or ())}}}"
    if not action.option_strings:
        return str(value)
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    more = f" [{value} ...]" if action.nargs == "+" else ""
    return ", ".join(f"{option} {value}{more}" for option in action.option_strings)


def _code(commands: Any) -> list[str]:
    lines = "\n".join(commands).replace("\n", "\n    ")
    return [".. code-block:: console", "", f"    {lines}", ""]


def _escaped(text: str | None) -> str:
    """Help as reStructuredText: code, options and quoted patterns are literal text."""
    return re.sub(r"`([^`]+)`|(?<!\S)(--[a-z-]+)|('\S+')", _literal, text or "")


def _literal(match: re.Match[str]) -> str:
    return f"``{next(filter(None, match.groups()))}``"


class CommandDirective(SphinxDirective):
    """``.. sksoup-command:: greedy``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        found = nodes.Element()
        lines = page_of(self.arguments[0]).splitlines()
        self.state.nested_parse(StringList(lines, source="command_line.py"), 0, found)
        return found.children


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("sksoup-command", CommandDirective)
    return {"parallel_read_safe": True}
