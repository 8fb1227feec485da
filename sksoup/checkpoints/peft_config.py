"""PEFT's adapter_config.json: what a LoRA adapter's factors mean, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError
from .texts import read_text

CONFIG = "adapter_config.json"
LIMIT = 1 << 20  # bytes; with patterns for every layer a config has some 100 kB
# fields that say how an adapter was trained, or that are understood here; all others must be off
KNOWN = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
        "use_rslora", "fan_in_fan_out", "bias", "modules_to_save", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
        "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size",
        "eva_config",
    }
)  # fmt: skip
# ways to begin that leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ, ... change it
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# names of bases whose weights are packed
QUANTIZED = re.compile(r"(?i)(bnb|nf4|gptq|awq|hqq|fp8|\bint[48]|[48]-?bit)")
# a pattern of names may take exponential time to match: a repeat multiplies it by some 100, one
# of a group may square it, an optional part (not the "?" of a group or a lazy repeat) doubles it,
# and a group of alternatives multiplies it by their number
REPEATS = re.compile(r"[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
OPTIONAL = re.compile(r"(?<![(*+}])\?")
MOST_REPEATS = 2
MOST_TRIES = 1e5  # of all patterns of a field
LONGEST_PATTERN = 500  # characters
FLAGS = re.compile(r"\(\?(?!:)")  # and lookarounds; sets of many ranges compile slowly under (?i)
MOST_PATTERNS = 10_000  # one for each layer is some 500


@dataclass(frozen=True)
class PeftConfig:
    """What a configuration says of the factors.

    Parameters
    ----------
    where : str
        The adapter, for errors.
    fields : mapping
        As ``adapter_config.json`` holds them.
    """

    where: str
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read and check the configuration in a PEFT folder."""
        path = folder / CONFIG
        try:
            fields = json.loads(read_text(path, LIMIT))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{str(path)!r} can't be read: {error}.") from error
        if not isinstance(fields, dict):
            raise CheckpointError(
                f"{str(path)!r} can't be used: it holds a {type(fields).__name__}, expected an "
                f"object with 'peft_type' and 'r'."
            )
        return cls(repr(str(folder)), fields).checked()

    @property
    def base_model(self) -> str:
        """Name or path of the base; empty where none is named."""
        name = self.fields.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @property
    def is_of_quantized_base(self) -> bool:
        """Whether the name of the base says that its weights are packed."""
        return QUANTIZED.search(self.base_model) is not None

    def checked(self) -> PeftConfig:
        """The same, once it is known to be plain LoRA and every field to be understood."""
        fields = self.fields
        kind = fields.get("peft_type")
        if kind != "LORA":
            self._refuse(f"its 'peft_type' is {kind!r}, and only LORA is a sum of products")
        for name, value in fields.items():
            if name not in KNOWN and value:  # empty, None, False and 0 switch it off
                self._refuse(f"it was trained with {name}={_short(value)}, which is not known here")
        start = fields.get("init_lora_weights")
        if start not in PLAIN_STARTS:
            self._refuse(
                f"it was trained with init_lora_weights={_short(start)}, which changes the base"
            )
        if (bias := fields.get("bias", "none")) not in ("none", "all", "lora_only"):
            self._refuse(f"its 'bias' is {_short(bias)}, expected 'none', 'all' or 'lora_only'")
        self._check_number("r", fields.get("r", 8), is_count=True)
        self._check_number("lora_alpha", fields.get("lora_alpha", 8))
        for name, is_count in (("rank_pattern", True), ("alpha_pattern", False)):
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict):
                self._refuse(f"its {name!r} is {_short(patterns)}, expected an object")
            self._check_patterns(name, patterns)
            for pattern, value in patterns.items():
                self._check_number(f"{name}[{_short(pattern)}]", value, is_count)
        return self

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by: lambda."""
        expected = self._of_module("rank_pattern", module, self.fields.get("r", 8))
        if expected != rank:
            self._refuse(f"the factors of {module!r} have rank {rank}, and it says {expected}")
        alpha = float(self._of_module("alpha_pattern", module, self.fields.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def check_selected(self, module: str) -> None:
        """Refuse factors of a module that PEFT, when it loads the adapter, would leave alone."""
        fields = self.fields
        if self._is_in(fields.get("exclude_modules"), module) is True:
            self._refuse(f"it has factors of {module!r}, which its 'exclude_modules' leaves out")
        targets = fields.get("target_modules")
        if targets and self._is_in(targets, module) is False:
            self._refuse(f"it has factors of {module!r}, which is not in its 'target_modules'")
        layers = fields.get("layers_to_transform")
        if layers is not None and layers != [] and not isinstance(targets, str):
            layers = layers if isinstance(layers, (list, tuple)) else [layers]
            index = self._layer_of(module)
            if index is not None and index not in layers:
                self._refuse(f"it has factors of {module!r}, not in its 'layers_to_transform'")

    def _is_in(self, modules: Any, module: str) -> bool | None:
        """Whether a field selects a module, as in PEFT; None where that can't be told."""
        if isinstance(modules, str):
            if modules == "all-linear" or not _is_quick(modules):
                return None
            return re.fullmatch(modules, module) is not None
        names = modules if isinstance(modules, (list, tuple, set)) else ()
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _layer_of(self, module: str) -> int | None:
        """The first number in the name that follows the name of a list; None where unknown."""
        if self.fields.get("layers_pattern"):
            return None
        found = re.match(r"[^.]+(?:\.[^.]+)*?\.(\d+)\.", module)
        return int(found[1]) if found else None

    def _of_module(self, field: str, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that the module's name ends in, as in PEFT."""
        for pattern, value in self._patterns[field]:
            if pattern.match(module):
                return value
        return otherwise

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        """For each field of patterns, each as an expression, and its value."""
        return {
            field: [(_expression(p), v) for p, v in (self.fields.get(field) or {}).items()]
            for field in ("rank_pattern", "alpha_pattern")
        }

    def _check_patterns(self, field: str, patterns: Mapping[Any, Any]) -> None:
        if len(patterns) > MOST_PATTERNS:
            self._refuse(f"its {field!r} holds {len(patterns):,} patterns, more than a network has")
        tries = 0.0
        for pattern in patterns:
            if not isinstance(pattern, str):
                self._refuse(f"its {field!r} holds {_short(pattern)}, expected texts")
            tries += _tries(pattern)
            if (
                len(REPEATS.findall(pattern)) > MOST_REPEATS
                or REPEATED_GROUP.search(pattern)
                or FLAGS.search(pattern)
                or len(pattern) > LONGEST_PATTERN
                or tries > MOST_TRIES
            ):
                self._refuse(
                    f"its {field!r} holds {_short(pattern)}, which may take too long to match: use "
                    f"at most {MOST_REPEATS} repeats, none of a group, few alternatives, no flags, "
                    f"and {LONGEST_PATTERN} characters"
                )
            try:
                _expression(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                self._refuse(
                    f"its {field!r} holds {_short(pattern)}, which is no pattern ({error})"
                )

    def _check_number(self, field: str, value: Any, is_count: bool = False) -> None:
        kinds = (int,) if is_count else (int, float)
        fits = type(value) in kinds and 0 < value < 1e9
        if not fits:
            kind = "an integer" if is_count else "a number"
            self._refuse(f"its {field!r} is {_short(value)}, expected {kind} above 0")

    def _refuse(self, why: str) -> None:
        raise CheckpointError(
            f"{self.where} can't be opened as a LoRA adapter: {why}. Merge it into its base model "
            f"(peft: model.merge_and_unload()) and give whole models instead."
        )


def is_adapter_folder(path: Path) -> bool:
    """Whether a path is a folder of PEFT."""
    return (path / CONFIG).is_file()


def _expression(pattern: str) -> re.Pattern[str]:
    """What PEFT matches the names of modules with."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _is_quick(pattern: str) -> bool:
    """Whether a pattern is known to match names quickly, and is one."""
    slow = REPEATED_GROUP.search(pattern) or FLAGS.search(pattern)
    if slow or len(pattern) > LONGEST_PATTERN or _tries(pattern) > MOST_TRIES:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _tries(pattern: str) -> float:
    """An upper bound, roughly, of the ways to match a pattern to a name; at most a billion."""
    bars, groups = pattern.count("|"), max(1, pattern.count("("))
    of_repeats = len(REPEATS.findall(pattern)) * math.log(100)
    of_options = len(OPTIONAL.findall(pattern)) * math.log(2)
    return math.exp(min(of_repeats + of_options + groups * math.log1p(bars / groups), 20.7))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
