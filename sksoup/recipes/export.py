"""Export of a fitted soup: files, folders, a report, a skorch net."""

from __future__ import annotations

import copy
import os
import warnings
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.converted import stored_names
from ..checkpoints.hub_companions import copy_companions, model_folders, record_dtype
from ..checkpoints.write import new_folder, write_anew, write_text
from ..data.outputs import Outputs, Task
from ..displays.report import render
from ..engine.objective import Forward, load_weights
from ..exceptions import CheckpointError, SoupWarning
from ..mixing.adapter import MixedAdapter, check_peft, mixed_adapter, write_adapter
from ..mixing.card import model_card
from ..mixing.files import check_suffix, refuse_inputs, refuse_other_text
from ..mixing.mix import cast, mix
from ..mixing.recipe import Recipe
from ..runtime.copies import copied
from ..runtime.distributed import rank as process_rank
from ..runtime.shards import refuse_copy, sharded_parts


class BinaryLoss(nn.BCEWithLogitsLoss):
    """The loss of one logit, which also takes labels that are integers."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, labels.to(logits.dtype))


class ExportMixin:
    """Export the weights of the fitted ``module_`` together with the ``recipe_``."""

    task: Task
    forward: Forward | None
    outputs_: Outputs
    module_: nn.Module
    checkpoints_: CheckpointCollection
    recipe_: Recipe
    coef_: Any
    ingredients_: tuple[str, ...]
    layers_: dict[str, int]
    recalibrated_: tuple[str, ...]
    _dtypes: dict[str, torch.dtype]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the soup's weights.

        Returns
        -------
        state_dict : dict of str to Tensor
            Copies on the CPU, in the dtypes of the checkpoints: bit for bit the result of
            ``mix(soup.checkpoints_, soup.coef_, layers=soup.layers_)``, except for the tensors in
            ``recalibrated_``. If ``module_`` is sharded, every rank that calls this method gets all
            tensors.
        """
        check_is_fitted(self, "coef_")
        if sharded_parts(self.module_):
            return mix(self.checkpoints_, self.coef_, layers=self.layers_)
        state = self.module_.state_dict()
        return {
            name: cast(name, state[name].detach().cpu().clone(), dtype)
            for name, dtype in self._dtypes.items()
        }

    def save(self, path: str | os.PathLike[str], card: bool = False) -> None:
        """Write the weights and the recipe atomically.

        Parameters
        ----------
        path : str or path-like
            With the suffix ``.safetensors``, one file holds both. With ``.pt``, ``.pth``, ``.bin``
            or ``.ckpt``, the file is a plain state dict, as written by
            ``torch.save(module.state_dict(), path)``, and the recipe is written next to it
            (``soup.recipe.json`` for ``soup.pt``). Existing files are replaced completely or not at
            all. ``Recipe.load(path).cook(checkpoints)`` rebuilds the weights. In a distributed job
            rank 0 writes, and the other ranks do not wait.
        card : bool, default=False
            Whether to write a model card next to the file, with the suffix ``.md``. An existing
            model card of a soup is replaced.

        Raises
        ------
        FileExistsError
            ``path`` is one of the checkpoints, or the card or the recipe would replace another file
            than those of this soup. Nothing is written.
        ValueError
            ``path`` has another suffix.
        OSError
            The folder does not exist, the disk is full, or permission is denied.

        Notes
        -----
        Two files can't be replaced in one atomic step. They are written under temporary names; then
        the recipe is renamed, then the weights. If the computer stops in between, the SHA-256 in
        the recipe does not match the weights, which ``Recipe.verify`` reports.
        """
        check_is_fitted(self, "coef_")
        check_suffix(Path(path))
        if process_rank():
            return
        refuse_inputs(Path(path), self.checkpoints_, self.checkpoints_)
        if card:
            refuse_other_text(Path(path).with_suffix(".md"))
        self.recipe_.save_weights(Path(path), self.state_dict())
        if card:
            write_text(Path(path).with_suffix(".md"), self.recipe_.to_card())

    def report(
        self, path: str | os.PathLike[str], comparison: Any = None, importance: Any = None
    ) -> None:
        """Write a report on the soup as one HTML file that opens in any browser, also offline.

        The report shows the ingredients, the scores, the coefficients and how they were found, and
        possible problems with suggestions.

        Parameters
        ----------
        path : str or path-like
            Path with the suffix ``.html``. An existing file is replaced.
        comparison : SoupComparison or None, default=None
            Result of `sksoup.inspection.compare_soups`, to compare the soup with other methods.
        importance : IngredientImportance or None, default=None
            Result of `sksoup.inspection.ingredient_importance`, to show which ingredients matter.

        Raises
        ------
        ValueError
            ``path`` has another suffix, or ``importance`` belongs to another soup.
        ImportError
            matplotlib is not installed.
        """
        check_is_fitted(self, "module_")
        if Path(path).suffix != ".html":
            raise ValueError(
                f"{os.fspath(path)!r} must have the suffix .html: the report is an HTML file."
            )
        if not process_rank():
            write_text(Path(path), render(self, comparison, importance))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder: weights, recipe, model card, configuration and tokenizer.

        Parameters
        ----------
        folder : str or path-like
            A new folder, which appears only when it is complete. ``from_pretrained`` of
            transformers reads it. ``config.json``, the tokenizer files and any further modules of
            sentence-transformers are copied from the first ingredient that is in a Hugging Face
            folder. For LoRA adapters the whole model is written, with the files of the base model
            and the configuration of ``module_``. Tensors have the names that transformers uses in
            files, which for some models differ from those in ``module_``.

        Raises
        ------
        CheckpointError
            No ingredient is from a Hugging Face folder, or further modules of sentence-transformers
            have weights that differ between the ingredients.
        FileExistsError
            The folder exists and is not empty.
        """
        check_is_fitted(self, "coef_")
        if process_rank():
            return
        sources = model_folders(self.checkpoints_, self.ingredients_, self.checkpoints_.names)
        adapters = self.checkpoints_.adapters(self.checkpoints_.names).values()
        config = getattr(self.module_, "config", None) if adapters else None
        if adapters and hasattr(config, "save_pretrained"):
            sources += [one.path for one in adapters if one.path is not None]
        if not sources:
            raise CheckpointError(
                f"{os.fspath(folder)!r} can't become a Hugging Face folder: no checkpoint has a "
                f"config.json next to it that could be copied. Use save(path)."
            )
        if sharded_parts(self.module_):
            self._save_in_parts(Path(folder), sources)
            return
        with new_folder(Path(folder)) as temporary:
            copy_companions(sources[0], temporary, sources[1:])
            if adapters and config is not None:  # of the base, with the head from the adapters
                _save_config(config, type(self.module_).__name__, temporary)
            state = self.state_dict()
            stored = stored_names(self.module_, state)
            self.recipe_.save_weights(temporary / "model.safetensors", state, stored)
            record_dtype(temporary)
            architecture = type(self.module_).__name__ if adapters else None
            card = model_card(self.recipe_, self.checkpoints_, architecture=architecture)
            write_text(temporary / "README.md", card)

    def _save_in_parts(self, folder: Path, sources: list[Path]) -> None:
        """Write a soup larger than memory: files of at most 5 GB, a few tensors at a time."""
        layout = self.checkpoints_.layout
        shapes = {name: torch.empty(info.shape, device="meta") for name, info in layout.items()}
        has_adapters = bool(self.checkpoints_.adapters(self.checkpoints_.names))
        if has_adapters or stored_names(self.module_, shapes).keys() != shapes.keys():
            raise CheckpointError(
                f"{os.fspath(folder)!r} can't become a Hugging Face folder from a sharded module: "
                f"the ingredients are adapters, or transformers uses other tensor names in files "
                f"than in the module. Use soup.recipe_.cook(checkpoints, out=folder), which writes "
                f"the weights with the names of the module."
            )
        with new_folder(folder) as temporary:
            weights = self.recipe_.cook(self.checkpoints_, temporary / "weights")
            for path in weights.iterdir():
                path.rename(temporary / path.name)
            weights.rmdir()
            copy_companions(sources[0], temporary, sources[1:])
            record_dtype(temporary)
            write_text(temporary / "README.md", model_card(self.recipe_, self.checkpoints_))

    def save_adapter(
        self,
        folder: str | os.PathLike[str],
        rank: int | None = None,
        X: Any = None,
        y: Any = None,
        *,
        sample_weight: Any = None,
    ) -> dict[str, float]:
        """Write a soup of LoRA adapters as one PEFT adapter.

        Parameters
        ----------
        folder : str or path-like
            A new folder, which appears only when it is complete, with a model card and the recipe.
            ``PeftModel.from_pretrained(base, folder)`` opens it.
        rank : int or None, default=None
            Rank of the factors of each layer. None concatenates the factors of all ingredients,
            which is exactly the soup. An integer writes the best approximation of that rank.
        X, y, sample_weight : as for `score`, default=None
            Data on which the adapter of that rank is compared with the soup.

        Returns
        -------
        errors : dict of str to float
            For each tensor with factors, the approximation error: the Frobenius norm of the part
            that is lost, relative to that of the full difference from the base. 0 if nothing is
            lost.

        Raises
        ------
        CheckpointError
            An ingredient is a whole model or has another base, or the statistics of BatchNorm were
            re-estimated.
        FileExistsError
            The folder exists and is not empty.
        ImportError
            peft is not installed.

        Warns
        -----
        SoupWarning
            On ``X`` and ``y`` the adapter of this rank and the soup have different scores.

        Notes
        -----
        The scaling is included in the factors, so ``lora_alpha`` equals the rank. Heads
        (``modules_to_save``) and biases are mixed as whole tensors. Factors are written in float32.
        """
        check_is_fitted(self, "coef_")
        check_peft()
        if rank is not None:
            check_scalar(rank, "rank", Integral, min_val=1)
        if self.recalibrated_:
            raise CheckpointError(
                f"This soup can't be written as an adapter: {self.recalibrated_[0]!r} was "
                f"re-estimated from data. Use save_pretrained or save, or fit with "
                f"batch_norm='average'."
            )
        coef = np.atleast_2d(self.coef_)
        mixed = mixed_adapter(self.checkpoints_, coef, self.layers_, self.state_dict(), rank)
        if X is not None and rank is not None:
            self._compare_scores(mixed, X, y, sample_weight)
        if not process_rank():
            with new_folder(Path(folder)) as temporary:
                write_adapter(temporary, mixed)
                self.recipe_.save(temporary / "recipe.json")
                card = model_card(self.recipe_, self.checkpoints_, mixed.errors)
                write_text(temporary / "README.md", card)
        return dict(mixed.errors)

    def _compare_scores(self, mixed: MixedAdapter, X: Any, y: Any, sample_weight: Any) -> None:
        """Warn if an adapter of lower rank has a different score than the soup."""
        near = copy.copy(self)
        near.module_ = copied(self.module_)
        load_weights(near.module_, mixed.on_base())
        scores = [
            one.score(X, y, sample_weight=sample_weight)  # type: ignore[attr-defined]
            for one in (self, near)
        ]
        if scores[0] != scores[1]:
            warnings.warn(
                f"The adapter of this rank scores {scores[1]:.4f}, the soup {scores[0]:.4f}. A "
                f"higher rank is more accurate; rank=None is exact.",
                SoupWarning,
                stacklevel=3,
            )

    def to_skorch(self, **kwargs: Any) -> Any:
        """Return an initialized skorch net with the soup's weights, for example to train further.

        Parameters
        ----------
        **kwargs : dict
            Parameters of the net. By default the criterion matches ``task`` and the device is that
            of the soup.

        Returns
        -------
        net : skorch.NeuralNetClassifier, NeuralNetBinaryClassifier or NeuralNetRegressor
            A binary classifier if the module returns one logit, a regressor for
            ``task="regression"``. Its module is a copy. ``net.partial_fit(X, y)`` continues
            training from these weights; ``fit`` does so only with ``warm_start=True``.

        Raises
        ------
        ValueError
            ``task`` is "multilabel" or the module returns one logit per pixel, for which skorch has
            no net, or the soup has a ``forward``, which skorch can't call.

        Notes
        -----
        skorch expects the indices of the module's outputs as labels, 0 to n_outputs - 1, and its
        ``predict`` returns these: ``recipe_.classes[i]`` is the label of output i. They are not
        indices of ``classes_``, which is sorted.
        """
        check_is_fitted(self, "module_")
        refuse_copy(self.module_)
        if self.task == "multilabel":
            raise ValueError(
                "skorch has no net for task='multilabel'. Pass module_ to a skorch.NeuralNet."
            )
        if self.outputs_.one_logit and self.outputs_.is_dense:
            raise ValueError(
                "skorch has no net for one logit per position. Pass module_ to a skorch.NeuralNet "
                "with criterion=nn.BCEWithLogitsLoss."
            )
        if self.forward is not None:
            raise ValueError(
                f"A skorch net calls module(X), not forward={self.forward!r} of this soup, so its "
                f"outputs would differ. Pass a module whose forward() does the same to a "
                f"skorch.NeuralNet, and load the weights from state_dict()."
            )
        kind: Any = NeuralNetClassifier
        criterion: type[nn.Module] = nn.CrossEntropyLoss
        if self.task == "regression":
            kind, criterion = NeuralNetRegressor, nn.MSELoss
        elif self.outputs_.one_logit:
            kind, criterion = NeuralNetBinaryClassifier, BinaryLoss
        device = next(self.module_.parameters()).device.type
        module = copied(self.module_).train()
        return kind(module, **{"criterion": criterion, "device": device, **kwargs}).initialize()


def _save_config(config: Any, architecture: str, folder: Path) -> None:
    """Write the configuration of a network of transformers, as of this class."""
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    try:
        text = config.to_json_string()
    except Exception as error:
        raise CheckpointError(
            f"The configuration of the {architecture} can't be written by transformers: "
            f"{type(error).__name__}: {error}. Use save(path)."
        ) from error
    write_anew(folder / "config.json", text)  # in place of that of the base
