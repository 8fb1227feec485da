"""Records that training loops write about checkpoints: the best one, and the scores."""

from __future__ import annotations

import json
import math
import re
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from ..exceptions import CheckpointError
from ..runtime.fingerprint import tensor_bytes
from .in_memory import content_sha256
from .protocol import Entry
from .read import RealFile, place_of, suffix_of
from .texts import read_text
from .torch_files import TorchFile, read_container

FEW = 64  # values of a tensor by which files are told apart
MOST_BYTES = 2**26  # enough for a log of a million evaluations
LOSS = "eval_loss"  # the metric that Trainer always evaluates
GREATER = re.compile(r"acc|f1|precision|recall|auc|iou|bleu|rouge|exact_match|matthews|pearson")
LESS = re.compile(r"loss|perplexity|error|mse|mae|_wer|_cer")
REMEDY = "Pass scores={name: score, ...}, greater is better, or omit scores to measure them."


@dataclass(frozen=True)
class Record:
    """The record of the checkpoints of one run, by their file names."""

    best: str | None = None
    metrics: Mapping[str, int] = field(default_factory=dict)  # of the best: 1, -1, or 0 if unknown
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by name, by metric
    # the step of each file, and a number that differs if the weights of files of one step do
    versions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bests: Mapping[str, Any] = field(default_factory=dict)  # the path of the best by each file
    last: int = -1  # the step at which it was written, if known


def read_trainer(state: Path, final: str) -> Record:
    """The record in a ``trainer_state.json``; ``final`` is the name of the run's final model."""
    if not state.is_file():
        return Record()
    record, of_final = _of_trainer(RealFile.at(state))
    if of_final is None:
        return record
    values = ChainMap({final: of_final}, record.values)  # type: ignore[arg-type]  # never written
    return replace(record, values=values)


@lru_cache(maxsize=100)  # many paths may be links to one file
def _of_trainer(file: RealFile) -> tuple[Record, dict[str, float] | None]:
    """The record in a file, and the values of the run's final model, if they are known."""
    state = file.path
    try:
        found = json.loads(read_text(state, MOST_BYTES))
        log = [entry for entry in found.get("log_history") or () if isinstance(entry, dict)]
    except CheckpointError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{str(state)!r} can't be read: it is not in the format of transformers' Trainer "
            f"({type(error).__name__}). Remove the file to use the last checkpoint."
        ) from error
    values: dict[str, dict[str, float]] = {}
    for entry in log:
        at = values.setdefault(f"checkpoint-{entry.get('step')}", {})
        numbers = ((str(name), _number(value)) for name, value in entry.items())
        at.update({n: v for n, v in numbers if n.startswith("eval_") and v is not None})
    step, last = found.get("best_global_step"), found.get("global_step")
    best = _file_name(found.get("best_model_checkpoint"))
    if best is None and isinstance(step, int):
        best = f"checkpoint-{step}"
    end = f"checkpoint-{last}"
    # else the final model may be that of the best or of the last step
    of_final = values.get(end, {}) if best in (None, end) else None
    score = _number(found.get("best_metric"))
    of_best = values.get(best or "", {})
    chosen_by = {name for name, value in of_best.items() if value == score}
    seen: dict[str, tuple[float, float]] = {}
    for of in values.values():
        for name in of.keys() & chosen_by:
            low, high = seen.get(name, (of[name], of[name]))
            seen[name] = min(low, of[name]), max(high, of[name])
    metrics = {name: _direction(name, of_best[name], *seen[name]) for name in chosen_by}
    return Record(best, metrics, values, last=last if isinstance(last, int) else -1), of_final


def _direction(name: str, best: float, low: float, high: float) -> int:
    """Whether a greater metric is better: Trainer records only which value was the best.

    Older versions compare only the steps that were saved with each other, so that the best may
    look like the worst of all evaluations. What contradicts the name of the metric is unknown.
    """
    is_most, is_least = best >= high, best <= low
    if (
        is_most == is_least
        or (is_least and GREATER.search(name))
        or (is_most and LESS.search(name))
    ):
        return 0
    return is_most - is_least


def read_lightning(files: Sequence[Path]) -> Record:
    """The record that Lightning's ModelCheckpoint writes to each file of a run."""
    steps: dict[str, int] = {}
    states: dict[str, _Monitor] = {}
    first: dict[object, Path] = {}
    same = {path.name: first.setdefault(place_of(path), path) for path in files}  # links to a file
    recorded = cache(_recorded)
    for path in files:
        if suffix_of(path) == ".ckpt":
            step, state = recorded(same[path.name])
            if isinstance(step, int):
                steps[path.name], states[path.name] = step, state
    best, metrics = None, {}
    values: dict[str, dict[str, float]] = {name: {} for name in steps}
    # the last record is current; of those of one step, that in a file which it lists, since another
    # callback may have written its file before this one decided
    order = {name: (step, name in states[name].kept) for name, step in steps.items()}
    for name in sorted(steps, key=order.__getitem__):
        state = states[name]
        if state.metric is None:
            continue
        best = _file_name(state.best)
        metrics = {state.metric: {"min": -1, "max": 1}.get(state.mode, 0)}
        for file, number in state.kept.items():
            if number is not None:
                values.setdefault(file, {})[state.metric] = number
    versions = _versions(same, steps)
    known: dict[tuple[int, int], dict[str, float]] = {}
    for name, version in versions.items():
        if values[name]:
            known.setdefault(version, values[name])
    for name, version in versions.items():  # last.ckpt has the same weights as another file
        values[name] = values[name] or known.get(version, {})
    bests = {name: state.best or None for name, state in states.items()}
    return Record(best, metrics, values, versions, bests)


def _versions(files: Mapping[str, Path], steps: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The step of each file, numbered if the weights of files of one step differ."""
    keys: dict[str, tuple[object, ...]] = {name: (step,) for name, step in steps.items()}
    for look in map(cache, (_glance, _digest)):  # only files that look alike are read
        found = Counter(keys.values())
        keys = {n: (*key, look(files[n])) if found[key] > 1 else key for n, key in keys.items()}
    numbers: dict[int, dict[tuple[object, ...], int]] = {step: {} for step in steps.values()}
    return {
        name: (step, numbers[step].setdefault(keys[name], len(numbers[step])))
        for name, step in steps.items()
    }


def _glance(path: Path) -> str:
    """SHA-256 of a few values of each tensor; the path if the file can't be opened."""
    digest = sha256()
    try:
        checkpoint = TorchFile(path, "state_dict", path)
        with checkpoint.open() as read:
            for name, info in checkpoint.header.items():
                digest.update(f"{name}:{info.dtype}:{info.shape};".encode())
                digest.update(tensor_bytes(_ends(read(name))))
    except CheckpointError:  # the error is raised if it is used
        return str(path)
    return digest.hexdigest()


def _ends(tensor: torch.Tensor) -> torch.Tensor:
    """The first and the last values of a tensor, and all of a small one."""
    rows = tensor.flatten()
    return rows if len(rows) <= FEW else torch.cat([rows[: FEW // 2], rows[-FEW // 2 :]])


def _digest(path: Path) -> str:
    try:
        return content_sha256(Entry(TorchFile(path, "state_dict", path)))
    except CheckpointError:
        return str(path)


def recorded_scores(taken: Sequence[tuple[Path, Record]]) -> list[float]:
    """The score of every checkpoint by one metric, greater is better; raise if there is none."""
    records = {id(record): record for _, record in taken if record.metrics}.values()
    named = [record.metrics.keys() for record in records]  # of each run, not of each checkpoint
    metrics = sorted(set(named[0]).intersection(*named[1:])) if named else [LOSS]
    if not metrics:
        listed = sorted(set().union(*named))
        raise _no_scores(
            f"the runs chose their best checkpoints by different metrics, {', '.join(listed[:5])}"
        )
    found = {metric: _scores_by(metric, taken) for metric in metrics}
    if len({tuple(scores) for scores in found.values()}) > 1:
        raise _no_scores(
            f"the best checkpoint may have been chosen by {' or '.join(metrics[:5])}, which differ"
        )
    return found[metrics[0]]


def _scores_by(metric: str, taken: Sequence[tuple[Path, Record]]) -> list[float]:
    values = [record.values.get(path.name, {}).get(metric) for path, record in taken]
    without = [str(path) for (path, _), value in zip(taken, values, strict=True) if value is None]
    if without:
        raise _no_scores(
            f"{len(without)} of {len(taken)} checkpoints have no {metric!r}, such as "
            f"{without[0]!r}. It is read from trainer_state.json, at the step of the checkpoint, "
            f"and from the entry of Lightning's ModelCheckpoint(monitor=...) in each .ckpt file"
        )
    signs = {record.metrics.get(metric, 0) for _, record in taken} - {0}
    if not signs and metric.endswith("loss"):  # the default of Trainer
        signs = {-1}
    if len(signs) != 1:
        raise _no_scores(f"it is not recorded whether a greater {metric!r} is better")
    sign = signs.pop()
    return [sign * value for value in values if value is not None]


def _no_scores(why: str) -> CheckpointError:
    return CheckpointError(f"scores='recorded' can't be used: {why}. {REMEDY}")


@dataclass(frozen=True)
class _Monitor:
    """What a ModelCheckpoint has recorded: a metric, the best file and the files that it keeps."""

    metric: str | None = None
    mode: str = ""
    best: str | None = None
    kept: Mapping[str, float | None] = field(default_factory=dict)


def _recorded(path: Path) -> tuple[Any, _Monitor]:
    """The step of a file, and the record of the callback."""
    container = read_container(path)
    return container.get("global_step"), _model_checkpoint(container)


def _model_checkpoint(container: Mapping[str, Any]) -> _Monitor:
    """The record of the first ModelCheckpoint that monitors a metric; no tensor of the file."""
    callbacks = container.get("callbacks")
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        is_name = isinstance(key, str) and key.startswith("ModelCheckpoint")
        if is_name and isinstance(state, Mapping):
            mode = re.search(r"'mode': '(min|max)'", key)
            if isinstance(metric := state.get("monitor"), str):
                best, files = state.get("best_model_path"), state.get("best_k_models")
                kept = files.items() if isinstance(files, Mapping) else ()
                numbers = {name: _number(n) for path, n in kept if (name := _file_name(path))}
                best = best if isinstance(best, str) else None
                return _Monitor(metric, mode[1] if mode else "", best, numbers)
    return _Monitor()


def _file_name(path: Any) -> str | None:
    """The last part of a path on this or another machine, since sweeps may have been moved."""
    return PureWindowsPath(path).name or None if isinstance(path, str) else None


def _number(value: Any) -> float | None:
    """A finite number, also from a tensor with one element; None for anything else."""
    if isinstance(value, torch.Tensor):
        is_dense = value.layout is torch.strided and not value.is_quantized
        value = value.item() if is_dense and value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
