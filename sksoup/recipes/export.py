"""A fitted soup, out of Python: files, folders, a report, a net of skorch."""

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
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.converted import stored_names
from ..checkpoints.hub import hub_folder
from ..checkpoints.hub_companions import copy_companions
from ..checkpoints.write import new_folder, write_text
from ..data.outputs import Task
from ..displays.report import render
from ..engine.objective import load_weights
from ..exceptions import CheckpointError, SoupWarning
from ..mixing.adapter import MixedAdapter, check_peft, mixed_adapter, write_adapter
from ..mixing.card import model_card
from ..mixing.files import check_suffix
from ..mixing.mix import cast, mix
from ..mixing.recipe import Recipe
from ..runtime.distributed import rank as process_rank
from ..runtime.shards import refuse_copy, sharded_parts


class ExportMixin:
    """Give away the weights of the fitted ``module_``, and the ``recipe_`` with them."""

    task: Task
    module_: nn.Module
    checkpoints_: CheckpointCollection
    recipe_: Recipe
    coef_: Any
    layers_: dict[str, int]
    recalibrated_: tuple[str, ...]
    _dtypes: dict[str, torch.dtype]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the soup's weights.

        Returns
        -------
        state_dict : dict of str to Tensor
            Copies on the CPU, in the dtypes of the checkpoints: bit for bit
            ``mix(soup.checkpoints_, soup.coef_, layers=soup.layers_)``, but for ``recalibrated_``.
            Where ``module_`` is in shards it is that, of all tensors, on every rank that asks.
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
        """Write weights and recipe, atomically.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.safetensors``: one file with both. Or in ``.pt``, ``.pth``, ``.bin`` or
            ``.ckpt``: a plain state dict, as ``torch.save(module.state_dict(), path)`` writes it,
            with the recipe beside it, as ``soup.recipe.json`` for ``soup.pt``. What exists is
            replaced, by all of the new or not at all. ``Recipe.load(path).cook(checkpoints)``
            rebuilds the weights. In a distributed job rank 0 writes, and the others do not wait.
        card : bool, default=False
            Whether to write a model card beside it, with the suffix ``.md``.

        Raises
        ------
        ValueError
            Another suffix.
        OSError
            No such folder, no room, no permission.

        Notes
        -----
        Two files can't take their places in one step: they are written whole under other names,
        then the recipe is renamed, then the weights. If the computer stops in between, the
        SHA-256 in the recipe is not that of the weights, which ``Recipe.verify`` shows.
        """
        check_is_fitted(self, "coef_")
        check_suffix(Path(path))
        if process_rank():
            return
        self.recipe_.save_weights(Path(path), self.state_dict())
        if card:
            write_text(Path(path).with_suffix(".md"), self.recipe_.to_card())

    def report(
        self, path: str | os.PathLike[str], comparison: Any = None, importance: Any = None
    ) -> None:
        """Write one HTML file about the soup, to read in any browser, without a network.

        What was mixed, how well it does, the coefficients, how they were found, what to look at
        and what to do about it.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.html``; an existing file is replaced.
        comparison : SoupComparison or None, default=None
            What `sksoup.inspection.compare_soups` measured, to show the soup beside the others.
        importance : IngredientImportance or None, default=None
            What `sksoup.inspection.ingredient_importance` measured, to show which ingredients
            matter.

        Raises
        ------
        ValueError
            Another suffix; ``importance`` is of another soup.
        ImportError
            matplotlib is not installed.
        """
        check_is_fitted(self, "module_")
        if Path(path).suffix != ".html":
            raise ValueError(f"{os.fspath(path)!r} must end in .html: the report is a web page.")
        if not process_rank():
            write_text(Path(path), render(self, comparison, importance))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder: weights, recipe, card, and the ingredients' configuration.

        Parameters
        ----------
        folder : str or path-like
            A new folder; it appears once all of it is written. ``from_pretrained`` of transformers
            reads it. ``config.json`` and the tokenizer's files are those of the first checkpoint
            that lies in a folder of Hugging Face, and so are the further modules of
            sentence-transformers. Of LoRA adapters it is the whole model, with the files of the
            base and the configuration of ``module_``. Tensors have the names that transformers
            gives them in files, which for some models are not those of ``module_``.

        Raises
        ------
        CheckpointError
            The ingredients did not come from Hugging Face folders; or modules of
            sentence-transformers beside the network have weights that differ between them.
        FileExistsError
            The folder is there and not empty.
        """
        check_is_fitted(self, "coef_")
        if process_rank():
            return
        paths = [self.checkpoints_.path(name) for name in self.checkpoints_]
        adapters = self.checkpoints_.adapters(self.checkpoints_.names).values()
        folders = [hub_folder(path) for path in paths if path is not None]
        folders += [hub_folder(one.base.path) for one in adapters if one.base.path is not None]
        sources = [folder for folder in folders if folder is not None]
        config = getattr(self.module_, "config", None) if adapters else None
        if adapters and hasattr(config, "save_pretrained"):
            sources += [one.path for one in adapters if one.path is not None]
        if not sources:
            raise CheckpointError(
                f"{os.fspath(folder)!r} can't become a Hugging Face folder: no ingredient lies "
                f"beside a config.json that could be copied. Use save(path)."
            )
        if sharded_parts(self.module_):
            self._save_in_parts(Path(folder), sources)
            return
        with new_folder(Path(folder)) as temporary:
            copy_companions(sources[0], temporary, sources[1:])
            if adapters and config is not None:  # of the base, with the head that adapters hold
                config = copy.deepcopy(config)
                config.architectures = [type(self.module_).__name__]
                config.save_pretrained(str(temporary))
            state = self.state_dict()
            stored = stored_names(self.module_, state)
            self.recipe_.save_weights(temporary / "model.safetensors", state, stored)
            architecture = type(self.module_).__name__ if adapters else None
            card = model_card(self.recipe_, self.checkpoints_, architecture=architecture)
            write_text(temporary / "README.md", card)

    def _save_in_parts(self, folder: Path, sources: list[Path]) -> None:
        """Write a soup that no memory holds: files of 5 GB at most, a few tensors at a time."""
        layout = self.checkpoints_.layout
        shapes = {name: torch.empty(info.shape, device="meta") for name, info in layout.items()}
        has_adapters = bool(self.checkpoints_.adapters(self.checkpoints_.names))
        if has_adapters or stored_names(self.module_, shapes).keys() != shapes.keys():
            raise CheckpointError(
                f"{os.fspath(folder)!r} can't become a Hugging Face folder from a sharded module: "
                f"the ingredients are adapters, or transformers has other names for the tensors in "
                f"files. Use soup.recipe_.cook(checkpoints, out=folder), which writes the weights "
                f"by the module's names."
            )
        with new_folder(folder) as temporary:
            weights = self.recipe_.cook(self.checkpoints_, temporary / "weights")
            for path in weights.iterdir():
                path.rename(temporary / path.name)
            weights.rmdir()
            copy_companions(sources[0], temporary, sources[1:])
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
        """Write a soup of LoRA adapters as one adapter of PEFT.

        Parameters
        ----------
        folder : str or path-like
            A new folder; it appears once all of it is written, with a card and the recipe.
            ``PeftModel.from_pretrained(base, folder)`` opens it.
        rank : int or None, default=None
            Columns of the factors of each layer. None keeps all of them: those of the ingredients
            side by side, which is exactly the soup. With a rank, the nearest matrix of that rank.
        X, y, sample_weight : as for `score`, default=None
            Data to compare the scores of the soup and of the adapter of that rank on.

        Returns
        -------
        errors : dict of str to float
            For each tensor with factors, the length (Frobenius norm) of what the rank leaves out,
            relative to that of all that the soup adds to the base; 0 where nothing is.

        Raises
        ------
        CheckpointError
            An ingredient is a whole model or of another base; BatchNorm's statistics were
            re-estimated.
        FileExistsError
            The folder is there and not empty.
        ImportError
            peft is not installed.

        Warns
        -----
        SoupWarning
            On ``X`` and ``y``, the adapter of this rank has another score than the soup.

        Notes
        -----
        Scales are in the factors: lora_alpha is the rank. Heads (``modules_to_save``) and biases
        are mixed as whole tensors. Factors are written in float32.
        """
        check_is_fitted(self, "coef_")
        check_peft()
        if rank is not None:
            check_scalar(rank, "rank", Integral, min_val=1)
        if self.recalibrated_:
            raise CheckpointError(
                f"No adapter can hold this soup: {self.recalibrated_[0]!r} was re-estimated from "
                f"data. Use save_pretrained or save, or fit with batch_norm='average'."
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
        """Warn where an adapter of less rank scores otherwise than the soup."""
        near = copy.copy(self)
        near.module_ = copy.deepcopy(self.module_)
        load_weights(near.module_, mixed.on_base())
        scores = [
            one.score(X, y, sample_weight=sample_weight)  # type: ignore[attr-defined]
            for one in (self, near)
        ]
        if scores[0] != scores[1]:
            warnings.warn(
                f"The adapter of this rank scores {scores[1]:.4f}, the soup {scores[0]:.4f}. A "
                f"higher rank is nearer; rank=None is exact.",
                SoupWarning,
                stacklevel=3,
            )

    def to_skorch(self, **kwargs: Any) -> Any:
        """Give a skorch net with the soup's weights, initialised: to train on, or to hand over.

        Parameters
        ----------
        **kwargs : dict
            Parameters of the net; by default a criterion that fits ``task`` and the soup's device.

        Returns
        -------
        net : skorch.NeuralNetClassifier, or skorch.NeuralNetRegressor for ``task="regression"``
            Its module is a copy. ``net.partial_fit(X, y)`` trains from these weights; ``fit`` does
            so with ``warm_start=True``.

        Raises
        ------
        ValueError
            ``task="multilabel"``, for which skorch has no net.

        Notes
        -----
        skorch wants labels 0 to n_outputs - 1; its ``predict`` gives them, not ``classes_``.
        """
        check_is_fitted(self, "module_")
        refuse_copy(self.module_)
        if self.task == "multilabel":
            raise ValueError(
                "skorch has no net for task='multilabel'; give module_ to a skorch.NeuralNet."
            )
        is_regression = self.task == "regression"
        kind = NeuralNetRegressor if is_regression else NeuralNetClassifier
        criterion = nn.MSELoss if is_regression else nn.CrossEntropyLoss
        device = next(self.module_.parameters()).device.type
        module = copy.deepcopy(self.module_).train()
        return kind(module, **{"criterion": criterion, "device": device, **kwargs}).initialize()
