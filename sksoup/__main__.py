"""The command `sksoup`: run what is asked for, print the result or the error."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import takewhile
from typing import Any

from safetensors import SafetensorError

from .cli.output import check_output
from .cli.parser import build_parser
from .cli.wording import in_commands
from .exceptions import SoupWarning
from .tables import printable

# ours are ValueErrors, and an ArithmeticError where a search diverged
ERRORS = (ValueError, ArithmeticError, OSError, ImportError, SafetensorError)
# a number such as -2e-05, which argparse takes for an option
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)e[-+]?\d{1,3}", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parsed(sys.argv[1:] if argv is None else argv)
    try:
        with _shown_warnings(options.json) as warned:
            if "output" in options:
                check_output(options)
            status, document, text = options.run(options)
    except Exception as error:
        if not _is_told(error, options):
            raise
        message = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if not isinstance(error, ERRORS):
            message = f"{type(error).__name__}: {message}"
        if options.json:
            _print(json.dumps({"error": in_commands(message)}))
        else:
            print(f"sksoup: {_shown(in_commands(message))}", file=sys.stderr)
        return 2
    if options.json:
        document = {**document, **({"warnings": warned} if warned else {})}
        # JSON has no NaN, such as R² of a single row
        finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
        _print(json.dumps(finite, indent=1, allow_nan=False))
    else:
        _print(_shown(in_commands(text)))
    return int(status)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; names of files that a shell wrote for ``*`` are not taken for some."""
    parser = build_parser()
    options = [*takewhile(lambda each: each != "--", arguments)]
    for one in options:
        if one.startswith("-") and os.path.lexists(one):
            parser.error(
                f"{printable(one)!r} is a file in this folder, and would be an option. Write ./* "
                f"instead of *, or rename the file."
            )
    if any(one.startswith("--weights") for one in options):
        options = [format(Decimal(n), "f") if NEGATIVE.fullmatch(n) else n for n in options]
    return parser.parse_args([*options, *arguments[len(options) :]])


def _is_told(error: Exception, options: argparse.Namespace) -> bool:
    """Whether the message of an error says enough, and the lines of code are of no use.

    A network of transformers raises errors of any class for rows that do not fit it; the code of
    --module is the user's.
    """
    is_of_row = getattr(options, "module", None) is None and bool(getattr(error, "__notes__", ()))
    return is_of_row or isinstance(error, ERRORS)


def _print(text: str) -> None:
    """Print a result; a reader that has ended, such as head, is no error."""
    encoding = sys.stdout.encoding or "utf-8"  # of a file, it may lack letters of names
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # Python would print an error at the end, when it flushes again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _shown_warnings(is_json: bool) -> Iterator[list[str]]:
    """Print our warnings without the line of code that gave them; collect them for JSON."""
    found: list[str] = []
    shown_before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if not issubclass(category, SoupWarning):
            shown_before(_shown(str(message)), category, *args, **kwargs)  # may quote a file
            return
        found.append(in_commands(str(message)))
        if not is_json:
            print(f"sksoup: warning: {_shown(found[-1])}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SoupWarning)
        warnings.showwarning = show
        yield found


def _shown(text: str) -> str:
    """Lines for a terminal, which obeys escape sequences in names of files and tensors."""
    return "\n".join(printable(line) for line in text.split("\n"))


if __name__ == "__main__":
    sys.exit(main())
