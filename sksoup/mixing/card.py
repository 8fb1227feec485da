"""The model card of a soup in Markdown."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.collection import CheckpointCollection
from ..data.tokens import shown_score
from ..tables import Table, printable
from .origins import Origin, common_origin

TAGS = ("model-soup", "merge", "sksoup")
REBUILD = """\
The exact coefficients are in the file's metadata, or in the `.recipe.json` next to it. If you \
have the ingredients, you can rebuild the weights and compare them bit for bit:

```
sksoup verify FILE FOLDER_OF_INGREDIENTS
```
"""


LOAD = """\
```python
from transformers import {name}

model = {name}.from_pretrained("FOLDER")  # or the name of its repository
model.eval()
```
"""
LOAD_FILE = """\
```python
from safetensors.torch import load_file

model = build_model()  # your class, as for the ingredients
model.load_state_dict(load_file("FILE"))  # for a .pt file: torch.load("FILE", weights_only=True)
model.eval()
```
"""


LOAD_ADAPTER = """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "FOLDER")  # the network that the adapters were trained on
model.eval()
```
"""
REBUILD_ADAPTER = """\
The exact coefficients are in `recipe.json`. If you have the ingredients and their base, you can \
rebuild the whole network:

```
sksoup cook recipe.json FOLDER_OF_ADAPTERS --base BASE -o soup.safetensors
```
"""
# characters from which GitHub makes links, mentions and formulas
LIVE = re.compile(r"[@$]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
MOST_ROWS = 20  # rows in a table of layers


def is_card(text: str) -> bool:
    """Whether a text is a model card that `model_card` made: by the tags in its front matter."""
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    return all(tag in head for tag in TAGS)


def model_card(
    recipe: Any,
    checkpoints: CheckpointCollection | None = None,
    errors: Mapping[str, float] | None = None,
    architecture: str | None = None,
) -> str:
    """A model card in the style of Hugging Face; all texts from outside are escaped.

    With the ingredients it is the card of a Hugging Face folder, with information on which their
    folders agree; with ``errors``, that of a PEFT folder with these approximation errors.
    ``architecture`` is the class for loading it if no config of an ingredient names one.
    """
    used = [
        one for one, is_used in zip(recipe.ingredients, recipe.is_used(), strict=True) if is_used
    ]
    origin = Origin()
    if checkpoints is not None:
        origin = common_origin(_folder(checkpoints, one.name) for one in used)
    library = None if checkpoints is None else "transformers" if errors is None else "peft"
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
        _front_matter(origin, library),
        f"# {_plain(recipe.method)} of {len(rows)} checkpoint{'s' * (len(rows) > 1)}\n",
        f"A model soup of {len(rows)} of {len(recipe.ingredients)} checkpoints, made with "
        f"{_code(recipe.method)} of sksoup. Its weights are a weighted sum of theirs, with the "
        f"coefficients below, which sum to 1. It costs as much to run as one of them.\n",
        Table(header, rows, left=(0, 3)).to_markdown() + "\n",
    ]
    if recipe.held_out is not None:
        score, n = recipe.held_out
        parts.append(
            f"It scores {shown_score(score, recipe.params.get('task'))} on {n:,} held-out rows. "
            f"The soup was selected by this score, so it is optimistic: expect less on new rows.\n"
        )
    if origin.labels and origin.labels != recipe.classes:
        parts.append(f"Labels: {', '.join(map(_code, origin.labels))}.\n")
    if recipe.classes:
        labels = ", ".join(_code(str(label)) for label in recipe.classes)
        parts.append(f"Outputs, in order: {labels}.\n")
    if recipe.temperature != 1.0:
        parts.append(
            f"Multiply the logits by {recipe.temperature:.6g} before computing probabilities.\n"
        )
    if recipe.recalibrated:
        parts.append(f"{len(recipe.recalibrated)} tensors were re-estimated from data.\n")
    name = origin.architecture or architecture or "AutoModel"
    load = {None: LOAD_FILE, "transformers": LOAD.format(name=name), "peft": LOAD_ADAPTER}
    if errors is not None:
        parts.append(_of_rank(errors))
    parts += [
        load[library],
        REBUILD if errors is None else REBUILD_ADAPTER,
        f"Parameters: {_listed(recipe.params)}.\n",
        f"Versions: {_listed(recipe.versions)}.\n",
    ]
    return "\n".join(parts)


def _folder(checkpoints: CheckpointCollection, name: str) -> Path | None:
    """The folder of an ingredient."""
    path = checkpoints.path(name) if name in checkpoints else None
    return path if path is None or path.is_dir() else path.parent


def _of_rank(errors: Mapping[str, float]) -> str:
    """How well an adapter approximates its soup, layer by layer."""
    if not any(errors.values()):
        return (
            "This adapter equals the soup exactly: its factors are those of the ingredients, "
            "concatenated.\n"
        )
    worst = sorted(errors, key=lambda name: -errors[name])[:MOST_ROWS]
    rows = [(_code(name), f"{errors[name]:.3g}") for name in worst]
    more = f" ({len(worst)} of {len(errors)} layers)" if len(worst) < len(errors) else ""
    return (
        f"Its factors have a lower rank than the soup. The error relative to the full difference "
        f"from the base{more}:\n\n"
        + Table(("layer", "relative error"), rows, left=(0,)).to_markdown()
        + "\n"
    )


def _front_matter(origin: Origin, library: str | None) -> str:
    """Metadata for the hub as YAML; values are ASCII JSON strings, which can't break out of it."""
    values: dict[str, Any] = {
        "base_model": origin.base_model,
        "library_name": library,
        "pipeline_tag": origin.task,
        "license": origin.licence,
        "tags": list(TAGS),
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _plain(text: str) -> str:
    """Text that can't break out of a cell of a Markdown table, into HTML, or become a link."""
    safe = html.escape(_one_line(text), quote=False)
    safe = "".join(f"\\{c}" if c in "\\`*_[]|#~!" else c for c in safe)
    return LIVE.sub(r"<span>\g<0></span>", safe)


def _code(text: str) -> str:
    """Text as a code span, which it can't end; backslash escapes have no effect in it."""
    return f"`{html.escape(_one_line(text), quote=False).replace('`', chr(39))}`"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} = {_plain(str(v))}" for name, v in values.items()) or "none"
