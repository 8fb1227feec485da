"""Real LoRA adapters: a pretrained text encoder, fine-tuned by peft with drawn hyper-parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sksoup import CheckpointCollection

from . import zoo

TARGETS = (["query", "value"], ["query", "key", "value"], ["query", "key", "value", "dense"])
RANKS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters of one adapter."""

    rank: int
    alpha: int
    is_rslora: bool
    targets: Sequence[str]
    lr: float
    weight_decay: float
    smoothing: float
    epochs: int


def draw(seed: int, k: int) -> Tuning:
    """The k-th adapter's hyper-parameters."""
    rng = np.random.default_rng([seed, k])
    rank = int(rng.choice(RANKS))
    return Tuning(
        rank, rank * int(rng.choice([1, 2])), bool(rng.random() < 0.25),
        TARGETS[rng.integers(len(TARGETS))], 10 ** rng.uniform(-3.5, -2.3),
        10 ** rng.uniform(-4, -1), float(rng.choice([0.0, 0.1])), int(rng.integers(2, 5)),
    )  # fmt: skip


def load_base(folder: Path) -> nn.Module:
    """The base of the adapters: the encoder, with a head that was trained alone."""
    from transformers import AutoModelForSequenceClassification

    base: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", local_files_only=True
    )
    return base


def make_base(folder: Path, seed: int, rows: tuple[zoo.Tokens, torch.Tensor]) -> None:
    """Train the head on the frozen encoder, and save both."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            zoo.encoder_folder(), num_labels=len(zoo.PACKAGES), local_files_only=True
        )
        model.base_model.requires_grad_(False)
        zoo._train_texts(
            model, *rows, lr=1e-2, weight_decay=0.0, smoothing=0.0, epochs=2, seed=seed,
            parameters=model.classifier.parameters(),
        )  # fmt: skip
    model.save_pretrained(part := folder / "base.part")
    part.rename(folder / "base")


def train_adapter(folder: Path, seed: int, k: int, rows: tuple[zoo.Tokens, torch.Tensor]) -> Any:
    """A PeftModel of the base in a folder, trained with the k-th hyper-parameters."""
    from peft import LoraConfig, get_peft_model

    tuning = draw(seed, k)
    with torch.random.fork_rng():
        torch.manual_seed(1000 * seed + k)
        config = LoraConfig(
            task_type="SEQ_CLS", r=tuning.rank, lora_alpha=tuning.alpha,
            use_rslora=tuning.is_rslora, target_modules=list(tuning.targets), lora_dropout=0.05,
        )  # fmt: skip
        model = get_peft_model(load_base(folder), config)
        zoo._train_texts(
            model, *rows, lr=tuning.lr, weight_decay=tuning.weight_decay,
            smoothing=tuning.smoothing, epochs=tuning.epochs, seed=k,
            parameters=[p for p in model.parameters() if p.requires_grad],
        )  # fmt: skip
    return model


def make_adapters(
    folder: Path, n: int, seed: int, rows: tuple[zoo.Tokens, torch.Tensor]
) -> CheckpointCollection:
    """Fine-tune n adapters; folders that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        make_base(folder, seed, rows)
    paths = [folder / f"lora{k:02d}" for k in range(n)]
    for k, path in enumerate(paths):
        if not path.exists():
            train_adapter(folder, seed, k, rows).save_pretrained(
                str(part := path.with_suffix(".part"))
            )
            part.rename(path)
    return CheckpointCollection(paths, module=partial(load_base, folder))


# ------------------------------------------------------------------ baselines, without sksoup


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a PeftModel, merged by peft."""
    state: dict[str, torch.Tensor] = copy.deepcopy(model).merge_and_unload().state_dict()
    return state


def mean_of_heads(models: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of the heads, which peft's methods refuse to combine."""
    names = [name for name in models[0] if name.startswith("classifier.")]
    return {name: torch.stack([one[name] for one in models]).mean(dim=0) for name in names}


def combined_by_peft(folder: Path, paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """peft's ``add_weighted_adapter(combination_type="cat")`` with weights 1/K.

    peft refuses adapters that hold a head each: it gets them without, and the mean is put in. What
    it makes has the configuration of the first, with its scale by the root of the rank where that
    is rsLoRA, which is wrong for factors that have their scales already: a plain one goes first.
    """
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from safetensors.torch import load_file

    model: Any = None
    names = []
    configs: dict[Path, Any] = {path: LoraConfig.from_pretrained(str(path)) for path in paths}
    for path in sorted(paths, key=lambda path: bool(configs[path].use_rslora)):
        config = configs[path]
        config.modules_to_save, config.task_type, config.inference_mode = None, None, False
        if model is None:
            model = get_peft_model(load_base(folder), config, adapter_name=path.name)
        else:
            model.add_adapter(path.name, config)
        state = load_file(path / "adapter_model.safetensors")
        factors = {name: value for name, value in state.items() if ".lora_" in name}
        set_peft_model_state_dict(model, factors, adapter_name=path.name)
        assert get_peft_model_state_dict(model, adapter_name=path.name).keys() == factors.keys()
        names.append(path.name)
    weights = [1 / len(names)] * len(names)
    model.add_weighted_adapter(names, weights, "soup", combination_type="cat")
    model.set_adapter("soup")
    return whole(model) | _mean_head(paths)


def mean_of_factors(folder: Path, paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of A and the mean of B, as peft's "linear" combines them, then their product.

    peft refuses adapters of different ranks: factors are filled up with zeros, which changes no
    adapter. As there, each factor carries the root of weight and scale.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    base = load_base(folder).state_dict()
    sums: dict[str, list[torch.Tensor]] = {}
    for path in paths:
        config: Any = PeftConfig.from_pretrained(str(path))
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        state = load_file(path / "adapter_model.safetensors")
        root = (scale / len(paths)) ** 0.5
        for name, a in state.items():
            if not name.endswith(".lora_A.weight"):
                continue
            b = state[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            if target not in sums:
                sums[target] = [
                    a.new_zeros(max(RANKS), a.shape[1]),
                    b.new_zeros(len(b), max(RANKS)),
                ]
            sums[target][0][: len(a)] += root * a
            sums[target][1][:, : len(a)] += root * b
    return base | {name: base[name] + b @ a for name, (a, b) in sums.items()} | _mean_head(paths)


def _mean_head(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    prefix = "base_model.model."
    states = [load_file(path / "adapter_model.safetensors") for path in paths]
    return mean_of_heads([
        {name.removeprefix(prefix): value for name, value in state.items()} for state in states
    ])  # fmt: skip


def quiet() -> None:
    """No progress bars, and no word on what is on purpose."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
