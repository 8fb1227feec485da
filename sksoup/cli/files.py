"""Data in files: columns of a CSV file or arrays of an .npz file, and where each example is."""

from __future__ import annotations

import csv
import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.labels import numbers_in

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".npz")
LONGEST = 2**31 - 1  # characters in a cell: the largest limit on every platform
MOST_CHARACTERS = 1000  # of a label: an array has the longest for each row


@dataclass(frozen=True)
class DataFile:
    """A table of text cells, or arrays with an example per row."""

    path: Path
    parts: Mapping[str, Any]  # columns (list of str), or arrays
    lines: Sequence[int] | None = None  # of a table: the line that each example begins in

    @property
    def is_table(self) -> bool:
        return self.lines is not None

    @property
    def kind(self) -> str:
        return "column" if self.is_table else "array"

    def where(self, index: int, name: str) -> str:
        """Where an example's value is, as errors begin."""
        place = f"line {self.lines[index]}" if self.lines is not None else f"row {index}"
        return f"{str(self.path)!r}, {place}, {self.kind} {name!r}"

    def __getitem__(self, name: str) -> Any:
        if name not in self.parts:
            near = difflib.get_close_matches(name, self.parts, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if self.is_table and len(self.parts) == 1:
                hint += " If columns are separated by another character, give --delimiter."
            raise ValueError(
                f"{str(self.path)!r} has no {self.kind} {name!r}: expected one of "
                f"{listed(self.parts)}.{hint}"
            )
        return self.parts[name]

    def numbers(self, name: str) -> NDArray[Any]:
        """A column or an array as finite numbers."""
        if not self.is_table:
            return self._checked(name, "numbers", "biuf")
        cells: list[str] = self[name]
        found = np.array([_number(cell) for cell in cells], dtype=np.float64)
        if not np.isfinite(found).all():
            index = int(np.flatnonzero(~np.isfinite(found))[0])
            got = repr(cells[index]) if cells[index].strip() else "an empty cell"
            raise ValueError(
                f"{self.where(index, name)}: got {got}, expected a finite number. Correct it, "
                f"remove the row, or choose other columns (--inputs, or --text for texts)."
            )
        return found

    def texts(self, name: str) -> list[str]:
        """A column or an array as texts, none of them empty."""
        found = self[name]
        if not self.is_table:
            if found.dtype.kind != "U" or found.ndim != 1:
                raise ValueError(
                    f"{str(self.path)!r}: the array {name!r} has dtype {found.dtype} and shape "
                    f"{found.shape}, expected texts of shape (n_examples,)."
                )
            found = found.tolist()
        for index, text in enumerate(found):
            if not text.strip():
                raise ValueError(
                    f"{self.where(index, name)}: got an empty cell, expected a text. Fill it in, "
                    f"or remove the row."
                )
        return list(found)

    def labels(self, name: str, names: Sequence[str] = ()) -> NDArray[Any]:
        """A column or an array of labels: integers if all of them are, else texts.

        If both "01" and "1" occur they are different labels, so that all are texts, and so they are
        if the ``names`` of the outputs are numbers and texts.
        """
        if not self.is_table:
            return self._checked(name, "numbers or texts", "biufU")
        cells = self.texts(name)
        if len(longest := max(cells, key=len, default="")) > MOST_CHARACTERS:
            raise ValueError(
                f"{self.where(cells.index(longest), name)}: got a label of {len(longest):,} "
                f"characters, expected at most {MOST_CHARACTERS:,}. Name the column of labels; "
                f"texts are inputs (--text)."
            )
        if not len(numbers_in(names)) and set(cells) <= set(names):
            return np.array(cells)
        numbers = np.array([_number(cell) for cell in cells])
        with np.errstate(invalid="ignore"):  # also 1.0, as tables with missing values write it
            is_integer = np.isfinite(numbers) & (numbers == np.floor(numbers))
        if is_integer.all() and (np.abs(numbers) < 2**53).all():
            digits = {cell.strip() for cell in cells if cell.strip().isdigit()}
            if len(set(map(int, digits))) == len(digits):
                return numbers.astype(np.int64)
        return np.array(cells)

    def _checked(self, name: str, what: str, kinds: str) -> NDArray[Any]:
        """An array of some kinds of dtypes, without NaN or infinite values."""
        found: NDArray[Any] = self[name]
        if not found.ndim or not len(found):
            raise ValueError(
                f"{str(self.path)!r}: the array {name!r} has shape {found.shape}, expected a row "
                f"for each example, and at least one."
            )
        if found.dtype.kind not in kinds:
            raise ValueError(
                f"{str(self.path)!r}: the array {name!r} has dtype {found.dtype}, expected {what}."
            )
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
            index = int(np.flatnonzero(~finite)[0])
            raise ValueError(
                f"{self.where(index, name)}: got NaN or an infinite value, expected finite "
                f"numbers. Correct it, or remove the row."
            )
        return found


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(map(repr, known[:most])) + more


def read_file(path: Path, delimiter: str | None = None) -> DataFile:
    """Read a data file; ValueError or OSError says what is wrong with it, and where."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and delimiter is None:
        raise ValueError(
            f"{str(path)!r} has the suffix {path.suffix!r}, expected {', '.join(SUFFIXES)}. For a "
            f"table with another name give --delimiter."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {str(path)!r} (from the folder {str(Path.cwd())!r})."
        )
    found = _read_arrays(path) if suffix == ".npz" else _read_table(path, suffix, delimiter)
    if not found.parts or (found.is_table and not found.lines):
        raise ValueError(f"{str(path)!r} has no examples, expected at least one.")
    return found


def _number(cell: str) -> float:
    try:
        return math.nan if "_" in cell else float(cell)  # Python reads 1_000 as a number
    except ValueError:
        return math.nan


def _read_table(path: Path, suffix: str, delimiter: str | None) -> DataFile:
    separator = DELIMITERS.get(suffix, ",") if delimiter is None else delimiter
    separator = "\t" if separator == r"\t" else separator  # as shells pass it
    if len(separator) != 1 or separator in "\r\n\0":
        raise ValueError(f"--delimiter must be one character, or \\t for a tab, got {delimiter!r}.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            with _long_cells():
                return _collect(path, reader)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. "
            f"Save the table as UTF-8 (in a spreadsheet: 'CSV UTF-8')."
        ) from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """Temporarily read cells of any length: some texts are longer than csv's limit."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _collect(path: Path, reader: Any) -> DataFile:
    """The columns of a table with a header."""
    header: list[str] = []
    rows, lines, before = [], [], 0
    try:
        for cells in reader:
            begin, before = before + 1, reader.line_num
            if not cells:  # a blank line
                continue
            if not header:
                header = _checked_header(path, cells)
            elif len(cells) != len(header):
                raise ValueError(
                    f"{str(path)!r}, line {begin}: got {len(cells)} cells, expected "
                    f"{len(header)}, one for each of the columns {listed(header)}. Quote cells "
                    f'that hold the delimiter: "a, b".'
                )
            else:
                rows.append(cells)
                lines.append(begin)
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {reader.line_num}: {error}. A quote inside a quoted cell is "
            f'written twice: "a ""b"" c".'
        ) from error
    columns = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    return DataFile(path, columns, lines)


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{str(path)!r} has the column {name!r} more than once in its first line, which holds "
            f"the names of the columns. Give each column another name."
        )
    return names


def _read_arrays(path: Path) -> DataFile:
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = {name: archive[name] for name in archive.files}
    except Exception as error:  # of any class: of zipfile, zlib, tokenize and numpy
        raise ValueError(
            f"{str(path)!r} can't be read: expected an .npz file of numbers and texts, as "
            f"np.savez(path, X=X, y=y) writes it, without arrays of objects, which would be "
            f"unpickled ({error})."
        ) from error
    # others are other files in the archive
    arrays = {name: part for name, part in members.items() if isinstance(part, np.ndarray)}
    return DataFile(path, arrays)
