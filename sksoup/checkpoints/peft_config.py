"""PEFT's adapter_config.json: how to read LoRA factors, and which options are unsupported."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ..exceptions import CheckpointError
from ..tables import short
from .peft_patterns import check_patterns, check_work, expression, refuse
from .peft_targets import Targets
from .read import RealFile
from .texts import read_json

CONFIG = "adapter_config.json"
LIMIT = 1 << 20  # bytes; with patterns for every layer a config has some 100 kB
# fields about training, or that are supported here; all others must be switched off
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
# initializations that do not change the base; PiSSA, OLoRA, CorDA, LoftQ, ... change it
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# name parts of bases with quantized weights
QUANTIZED = re.compile(r"(?i)(bnb|nf4|gptq|awq|hqq|fp8|\bint[48]|[48]-?bit)")


@dataclass(frozen=True)
class PeftConfig:
    """The configuration of an adapter's factors.

    Parameters
    ----------
    where : str
        The adapter, as named in errors.
    fields : mapping
        Fields of ``adapter_config.json``.
    """

    where: str
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read and check the configuration in a PEFT folder."""
        path = folder / CONFIG
        return cls(repr(str(folder)), _fields(RealFile.at(path))).checked()

    @property
    def base_model(self) -> str:
        """Name or path of the base; empty if there is none."""
        name = self.fields.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @property
    def is_of_quantized_base(self) -> bool:
        """Whether the name of the base suggests that its weights are quantized."""
        return QUANTIZED.search(self.base_model) is not None

    def checked(self) -> PeftConfig:
        """The same, after checking that it is plain LoRA with supported fields only."""
        fields = self.fields
        kind = fields.get("peft_type")
        if kind != "LORA":
            self._refuse(f"its 'peft_type' is {kind!r}, expected 'LORA'")
        for name, value in fields.items():
            if name not in KNOWN and value:  # empty, None, False and 0 switch it off
                self._refuse(f"it was trained with {name}={short(value)}, which is not supported")
        start = fields.get("init_lora_weights")
        if start not in PLAIN_STARTS:
            self._refuse(
                f"it was trained with init_lora_weights={short(start)}, which changes the base"
            )
        if (bias := fields.get("bias", "none")) not in ("none", "all", "lora_only"):
            self._refuse(f"its 'bias' is {short(bias)}, expected 'none', 'all' or 'lora_only'")
        self._check_number("r", fields.get("r", 8), is_count=True)
        self._check_number("lora_alpha", fields.get("lora_alpha", 8))
        for name, is_count in (("rank_pattern", True), ("alpha_pattern", False)):
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict):
                self._refuse(f"its {name!r} is {short(patterns)}, expected an object")
            for pattern, value in patterns.items():
                self._check_number(f"{name}[{short(pattern)}]", value, is_count)
        self.check_work([""])
        return self

    @cached_property
    def targets(self) -> Targets:
        """The modules to which PEFT adds factors."""
        return Targets(self.where, self.fields)

    def check_work(self, modules: Collection[str]) -> None:
        """Raise an error for patterns that take too long to match with these modules."""
        check_work(self.where, self._tries, len(modules), max(map(len, modules), default=0))

    @cached_property
    def _tries(self) -> float:
        """Bound on the matching attempts per module name; raise an error if it is too large."""
        fields = ("rank_pattern", "alpha_pattern")
        of_fields = [check_patterns(self.where, f, self.fields.get(f) or {}) for f in fields]
        return self.targets.check() + sum(of_fields)

    def scaling(self, module: str, rank: int) -> float:
        """The factor lambda of the product of a module's factors."""
        expected = self._of_module("rank_pattern", module, self.fields.get("r", 8))
        if expected != rank:
            self._refuse(
                f"the factors of {module!r} have rank {rank}, expected {expected} as in "
                f"its configuration"
            )
        alpha = float(self._of_module("alpha_pattern", module, self.fields.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _of_module(self, field: str, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that matches the end of the module's name, as in PEFT."""
        for pattern, value in self._patterns[field]:
            if pattern.match(module):
                return value
        return otherwise

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        """The compiled patterns of each field, with their values."""
        return {
            field: [(expression(p), v) for p, v in (self.fields.get(field) or {}).items()]
            for field in ("rank_pattern", "alpha_pattern")
        }

    def _check_number(self, field: str, value: Any, is_count: bool = False) -> None:
        kinds = (int,) if is_count else (int, float)
        fits = type(value) in kinds and 0 < value < 1e9
        if not fits:
            kind = "an integer" if is_count else "a number"
            self._refuse(f"its {field!r} is {short(value)}, expected {kind} above 0")

    def _refuse(self, why: str) -> NoReturn:
        refuse(self.where, why)


@lru_cache(maxsize=16)  # many adapters may share one file
def _fields(file: RealFile) -> Mapping[str, Any]:
    fields = read_json(file.path, LIMIT)
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{str(file.path)!r} can't be used: it holds a {type(fields).__name__}, expected an "
            f"object with 'peft_type' and 'r'."
        )
    return fields


def adapter_folder(path: Path) -> Path | None:
    """The PEFT folder that a path is, or whose weights it is."""
    if is_adapter_folder(path):
        return path
    is_weights = path.name.startswith("adapter_model.") and is_adapter_folder(path.parent)
    return path.parent if is_weights else None


def is_adapter_folder(path: Path) -> bool:
    """Whether a path is a PEFT folder."""
    return (path / CONFIG).is_file()
