"""Language models: labels of tokens, which of them a model predicts, and their loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..runtime.shards import class_of

IGNORED = -100  # a label that is left out, as in torch's criteria
LANGUAGE_MODELING = "language-modeling"
# the same, where the module does not tell what it predicts
KINDS = {"causal-lm": "causal", "masked-lm": "masked", "seq2seq-lm": "seq2seq"}
TEXT_TASKS = (LANGUAGE_MODELING, *KINDS)
DECODER_INPUT = "decoder_input_ids"


def kind_of_model(module: Any, task: str) -> str:
    """Which token a position predicts: "causal" the next, "masked" and "seq2seq" its own label."""
    if task in KINDS:
        return KINDS[task]
    name = class_of(module).__name__
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        auto = transformers.models.auto.modeling_auto
        if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and "CausalLM" not in name:
            return "masked"
        if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return "causal"
    raise ValueError(
        f"task={task!r} is ambiguous for a {name}. Pass task='causal-lm' (predicts the next "
        f"token), 'masked-lm' (the token at its position) or 'seq2seq-lm' (labels of a decoder)."
    )


def targets_from(X: Any) -> NDArray[np.int64] | None:
    """The token ids in X, where a causal model has no other labels; else None.

    Padding is left out, and so is the first token after it, which nothing before it predicts.
    """
    ids = X.get("input_ids") if isinstance(X, Mapping) else X
    if ids is None or isinstance(ids, tuple):
        return None
    y: NDArray[np.int64] = torch.as_tensor(ids).cpu().numpy().astype(np.int64)  # a copy
    mask = X.get("attention_mask") if isinstance(X, Mapping) else None
    if mask is not None:
        is_padding = torch.as_tensor(mask).cpu().numpy() == 0
        y[is_padding] = IGNORED
        y[:, 1:][is_padding[:, :-1]] = IGNORED
    return y


def without_ignored(y: NDArray[Any], ignored: int) -> NDArray[Any]:
    """Token ids with -100 for another id that is ignored, such as that of padding."""
    if ignored == IGNORED:
        return y
    return np.where(y == ignored, IGNORED, np.asarray(y, dtype=np.int64))


def check_labels(
    y: NDArray[Any], kind: str, shape: tuple[int, ...], X: Any, is_part: bool = False
) -> None:
    """Raise an error unless labels are token ids for outputs (n_tokens, vocabulary).

    In a part of the rows, all labels may be ignored.
    """
    n_tokens, vocabulary = shape
    if y.ndim != 2 or y.shape[1] != n_tokens:
        raise ValueError(
            f"y has shape {y.shape}, but the module returns logits of {n_tokens} tokens, expected "
            f"one label per token, with {IGNORED} at positions to ignore. Labels are shifted "
            f"internally."
        )
    used = y[y != IGNORED]
    if used.size and (used.min() < 0 or used.max() >= vocabulary):
        wrong = used[(used < 0) | (used >= vocabulary)][0]
        raise ValueError(
            f"y holds {wrong}, expected token ids in [0, {vocabulary}), or {IGNORED} at positions "
            f"to ignore."
        )
    if is_part:
        return
    counted = y[:, 1:] if kind == "causal" else y
    if (counted == IGNORED).all():
        raise ValueError(
            f"y has no label to predict: all are "
            f"{IGNORED}{', or the first of their row' if kind == 'causal' else ''}."
        )
    ids = None if kind == "causal" else targets_from(X)
    if ids is not None and ids.shape == y.shape:
        _refuse_copies(ids, y, kind)


def _refuse_copies(ids: NDArray[Any], y: NDArray[Any], kind: str) -> None:
    """Raise an error if the labels are the inputs."""
    both = (ids != IGNORED) & (y != IGNORED)
    if both.any() and np.array_equal(ids[both], y[both]):
        what = "a masked" if kind == "masked" else "a sequence-to-sequence"
        raise ValueError(
            f"y equals the inputs, which {what} model would only have to copy. Pass its labels: "
            + (
                "the tokens that were masked (transformers' DataCollatorForLanguageModeling)."
                if kind == "masked"
                else "the token ids of the texts to be written."
            )
        )


def shifted(y: NDArray[Any], kind: str) -> NDArray[np.int64]:
    """The label that each position predicts: of causal models the next one, none at the end."""
    if kind != "causal":
        return np.asarray(y, dtype=np.int64)
    end = np.full((len(y), 1), IGNORED)
    return np.concatenate([y[:, 1:], end], axis=1).astype(np.int64)


def with_decoder_inputs(module: nn.Module, X: Any, y: Any, kind: str) -> Any:
    """Add the decoder's inputs, made from the labels as in transformers, if X has none."""
    if kind != "seq2seq" or (isinstance(X, Mapping) and DECODER_INPUT in X):
        return X
    make = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if make is None:
        raise ValueError(
            f"A {type(module).__name__} can't make its decoder's inputs from labels. Pass them in "
            f"X, under {DECODER_INPUT!r}."
        )
    named = dict(X) if isinstance(X, Mapping) else {"input_ids": X}
    labels = torch.as_tensor(y)
    return {**named, DECODER_INPUT: make(labels=labels).to(labels.device)}


def shown_score(score: float, task: Any) -> str:
    """A score as text; a language model's with its perplexity."""
    text = f"{score:.4f}"
    return f"{text} (perplexity {perplexity(score):.4g})" if task in TEXT_TASKS else text


def perplexity(score: float) -> float:
    """Exp of the mean loss per token, which is the negative score."""
    return math.exp(min(-score, 700.0))


def row_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n,): sums of the cross-entropies of a row's tokens (n, n_tokens), those left out at 0."""
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), y.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(len(y), -1).sum(dim=1)
