"""The model card of a soup: what was mixed, in Markdown."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from ..tables import Table, printable

FRONT_MATTER = """\
---
tags:
- model-soup
- merge
- sksoup
---
"""
REBUILD = """\
The exact coefficients are in the file's metadata. With the ingredients at hand, rebuild and \
compare the weights bit for bit:

```
python -m sksoup verify FILE FOLDER_OF_INGREDIENTS
```
"""


def model_card(recipe: Any) -> str:
    """A recipe in words, as a Hugging Face–style model card; texts from the recipe are escaped."""
    mean = recipe.coef.mean(axis=0)
    rows = [
        (_plain(one.name), f"{c:.4f}", _score(recipe.scores.get(one.name)), _code(one.sha256))
        for one, c, is_used in zip(recipe.ingredients, mean, recipe.is_used(), strict=True)
        if is_used
    ]
    n_layers = len(recipe.coef)
    layers = f"mean over {n_layers} layers" if n_layers > 1 else "of the network"
    header = ("ingredient", f"coefficient ({layers})", "held-out score", "SHA-256")
    parts = [
        FRONT_MATTER,
        f"# {_plain(recipe.method)} of {len(rows)} checkpoint{'s' * (len(rows) > 1)}\n",
        f"One network mixed from {len(rows)} of {len(recipe.ingredients)} checkpoints that were "
        f"fine-tuned from one start, by {_code(recipe.method)} of sksoup: its weights are "
        f"their sum with the coefficients below, which sum to 1. It costs no more to run than "
        f"any one of them.\n",
        Table(header, rows, left=(0, 3)).to_markdown() + "\n",
    ]
    if recipe.classes:
        labels = ", ".join(_code(str(label)) for label in recipe.classes)
        parts.append(f"Outputs, in order: {labels}.\n")
    if recipe.temperature != 1.0:
        parts.append(f"Multiply the logits by {recipe.temperature:.6g} for probabilities.\n")
    if recipe.recalibrated:
        parts.append(f"{len(recipe.recalibrated)} tensors were re-estimated from data.\n")
    parts += [
        REBUILD,
        f"Parameters: {_listed(recipe.params)}.\n",
        f"Versions: {_listed(recipe.versions)}.\n",
    ]
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Text that can't break out of a cell of a Markdown table, or into HTML."""
    safe = html.escape(_one_line(text), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#~!" else c for c in safe)


def _code(text: str) -> str:
    """Text as a span of code, which it can't end: escapes mean nothing in there, so none are."""
    return f"`{html.escape(_one_line(text), quote=False).replace('`', chr(39))}`"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} = {_plain(str(v))}" for name, v in values.items()) or "none"
