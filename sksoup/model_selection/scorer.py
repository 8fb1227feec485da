"""A scorer that saves the weights of every candidate, for the searches of scikit-learn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sklearn.metrics import check_scoring
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.in_memory import check_state_dict
from ..checkpoints.write import write_safetensors
from ..runtime.fingerprint import fingerprint
from .fine_tuning import RECORD, state_of


class CheckpointScorer:
    """Score a candidate and save its weights, in a search of scikit-learn.

    Passed as ``scoring=`` to a ``RandomizedSearchCV`` over a skorch net, it writes the weights of
    every candidate and split to a folder. The name of each file is a hash of the weights.

    Parameters
    ----------
    folder : str or path-like
        Folder for the checkpoints. Created if it does not exist.
    scoring : str, callable or None, default=None
        The score to return, as in scikit-learn.

    See Also
    --------
    SoupSearchCV : Fine-tune and mix in one estimator.

    Notes
    -----
    All candidates must start from the same weights. Pass a module *instance* to the net, because a
    clone of a net with a module class is initialized again. Candidates of different splits were
    trained on rows that others hold out, so fit the soup on rows that were not used in the search.

    Examples
    --------
    >>> from sksoup.model_selection import CheckpointScorer
    >>> CheckpointScorer("runs/search", scoring="accuracy")
    CheckpointScorer('runs/search', scoring='accuracy')
    """

    def __init__(self, folder: str | os.PathLike[str], scoring: Any = None) -> None:
        self.folder = Path(folder)
        self.scoring = scoring

    def __repr__(self) -> str:
        return f"CheckpointScorer({str(self.folder)!r}, scoring={self.scoring!r})"

    def __call__(self, estimator: Any, X: Any, y: Any = None, **kwargs: Any) -> float:
        """Score a fitted estimator and write its weights.

        Parameters
        ----------
        estimator : skorch net, pipeline that ends in one, or anything with ``module_``
            The fitted estimator.
        X : array-like
            Inputs.
        y : array-like or None, default=None
            Labels or targets.
        **kwargs : dict
            Passed to the scorer, such as ``sample_weight``.

        Returns
        -------
        score : float
            Greater is better.

        Raises
        ------
        TypeError
            The estimator has no ``module_``.
        """
        net = estimator[-1] if hasattr(estimator, "steps") else estimator
        module = getattr(net, "module_", None)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{type(net).__name__} has no module_ to save. CheckpointScorer needs fitted "
                f"skorch nets, or pipelines that end with one."
            )
        score = float(check_scoring(estimator, self.scoring)(estimator, X, y, **kwargs))
        state = check_state_dict(state_of(module), type(net).__name__)
        path = self.folder / f"{fingerprint(state)}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, state, {RECORD: json.dumps({"score": score})})
        return score

    def checkpoints(self, module: Any = None) -> CheckpointCollection:
        """Open the checkpoints that were saved.

        Parameters
        ----------
        module : callable, nn.Module, skorch net or None, default=None
            The architecture, as for `CheckpointCollection`.

        Returns
        -------
        checkpoints : CheckpointCollection
            The checkpoints, sorted by name, that is, by hash, without scores.
        """
        return CheckpointCollection.from_path(self.folder, module=module)
