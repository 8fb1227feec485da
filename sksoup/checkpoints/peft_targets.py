"""The modules to which PEFT adds factors when it loads an adapter, by its configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

from ..tables import short
from .peft_patterns import MOST_REPEATS, check_patterns, is_slow, refuse

NOT_PLAIN = re.compile(r"[\\^$*+?{}\[\]|()]")  # PEFT treats names with these as expressions
ALL_LINEAR = "all-linear"
MOST_LAYERS = 1 << 20
MOST_PATTERNS = 100  # of 'layers_pattern': one or two are usual
# a list of names, each escaped, as an expression: ^(a|b\.c)$
LISTED = r"((?:[\w|-]|\\\W)*)"
NAMES = re.compile(rf"\^?(?:\({LISTED}\)|{LISTED})\$?")
ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


class Targets:
    """The modules selected by a configuration, as in PEFT's `check_target_module_exists`."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where, self._fields = where, fields

    def check(self) -> float:
        """Raise an error for unsupported fields; return a bound on attempts per name."""
        tries = 0.0
        for field in ("target_modules", "exclude_modules"):
            value = self._fields.get(field)
            if isinstance(value, str):
                if field in self._matched:
                    tries += check_patterns(self.where, field, [value], MOST_REPEATS)
            else:
                self._names(field)
        for field in ("modules_to_save", "layers_pattern"):
            if odd := next((n for n in self._names(field) if NOT_PLAIN.search(n)), None):
                refuse(self.where, f"its {field!r} holds {short(odd)}, expected names of modules")
        if len(self._names("layers_pattern")) > MOST_PATTERNS:
            refuse(self.where, f"its 'layers_pattern' holds more than {MOST_PATTERNS} names")
        _ = self._layers
        return tries

    @cached_property
    def _matched(self) -> frozenset[str]:
        """The fields with an expression that is matched here: not a list, and not too long.

        Training libraries write long expressions, which only PEFT matches.
        """
        return frozenset(
            field
            for field, names in self._sets.items()
            if isinstance(value := self._fields.get(field), str)
            and not (names or field in self._all_linear or is_slow(value, MOST_REPEATS))
        )

    @cached_property
    def are_known(self) -> bool:
        """Whether no expression is trusted without matching."""
        known = self._matched | self._all_linear
        return all(
            names or field in known or not isinstance(self._fields.get(field), str)
            for field, names in self._sets.items()
        )

    @cached_property
    def _all_linear(self) -> frozenset[str]:
        """The fields that stand for all linear layers."""
        return frozenset(
            field
            for field in self._sets
            if isinstance(value := self._fields.get(field), str) and value.lower() == ALL_LINEAR
        )

    def selects(self, module: str, is_linear: bool, is_output: bool) -> bool:
        """Whether PEFT adds factors to a module; "all-linear" excludes it if ``is_output``."""
        if self._is_in("exclude_modules", module):
            return False
        if not self._saved.isdisjoint(_spans(module)):
            return False
        targets = self._fields.get("target_modules")
        if "target_modules" in self._all_linear:
            return is_linear and not is_output
        if not self._is_in("target_modules", module):
            return False
        is_by_suffix = not isinstance(targets, str) and module not in self._sets["target_modules"]
        return not is_by_suffix or self._is_in_layers(module)

    def _is_in(self, field: str, module: str) -> bool:
        """Whether a name ends with one of a list, or matches an expression."""
        value = self._fields.get(field)
        if not value:
            return False
        if isinstance(value, str):
            listed = self._sets[field]
            if listed or field in self._matched:
                return module in listed if listed else re.fullmatch(value, module) is not None
            return field == "target_modules"  # trusted without matching
        return not self._sets[field].isdisjoint(_ends(module))

    def _is_in_layers(self, module: str) -> bool:
        if not self._layers:
            return True
        patterns = [
            re.compile(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.")
            for name in self._names("layers_pattern")
        ]
        found = (pattern.match(module) for pattern in patterns or [ANY_LAYER])
        match = next(filter(None, found), None)
        return match is not None and int(match["index"]) in self._layers

    @cached_property
    def _sets(self) -> dict[str, frozenset[str]]:
        fields = ("target_modules", "exclude_modules")
        return {
            field: frozenset(_listed(value) or ())
            if isinstance(value := self._fields.get(field), str)
            else frozenset(self._names(field))
            for field in fields
        }

    @cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self._names("modules_to_save"))

    @cached_property
    def _layers(self) -> frozenset[int]:
        value = self._fields.get("layers_to_transform")
        layers = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        # large integers may have equal hashes
        if any(type(layer) is not int or abs(layer) > MOST_LAYERS for layer in layers):
            refuse(
                self.where,
                f"its 'layers_to_transform' is {short(value)}, expected integers up to "
                f"{MOST_LAYERS:,}",
            )
        return frozenset(layers)

    def _names(self, field: str) -> Collection[str]:
        """A field that is a list of names or None; raise an error for anything else."""
        value = self._fields.get(field) or ()
        if isinstance(value, str) and field == "layers_pattern":
            return [value]
        is_list = isinstance(value, (list, tuple, set, frozenset))
        if not is_list or not all(isinstance(name, str) for name in value):
            refuse(self.where, f"its {field!r} is {short(value)}, expected a list of names")
        names: Collection[str] = value
        return names


def _listed(pattern: str) -> frozenset[str] | None:
    """The names in an expression that is a plain list, as in a soup's adapter."""
    if (found := NAMES.fullmatch(pattern)) is None:
        return None
    names = found[1] if found[1] is not None else found[2]
    return frozenset(re.sub(r"\\(\W)", r"\1", name) for name in names.split("|"))


def _ends(module: str) -> Iterator[str]:
    """The name, and its parts after each dot."""
    yield module
    parts = module.split(".")
    yield from (".".join(parts[k:]) for k in range(1, len(parts)))


def _spans(module: str) -> Iterator[str]:
    """All parts of a name between two dots or its ends."""
    parts = module.split(".")
    yield from (
        ".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
    )
