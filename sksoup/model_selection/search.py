"""Fine-tune a network many times, then soup the results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier, is_regressor
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import ParameterSampler, ShuffleSplit, StratifiedShuffleSplit, check_cv
from sklearn.utils import Tags, check_random_state, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.arrays import map_inputs
from ..data.outputs import Task
from ..engine.objective import module_dtype
from ..engine.probabilities import check_net
from ..recipes.base import BaseSoup, DocLinkMixin
from ..recipes.baselines import CheckpointEnsemble
from ..recipes.greedy import GreedySoup
from ..recipes.validation import to_numpy, validate_rows
from .fine_tuning import (
    Candidate,
    check_takes_weight,
    find_start,
    fine_tune,
    refuse_pipeline,
)
from .manifest import claim, make_manifest, recorded_seed


@dataclass(eq=False, repr=False)
class SoupSearchCV(DocLinkMixin, MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """Fine-tune a network many times with sampled hyperparameters and mix the results.

    Every candidate starts from the same weights and is fine-tuned on the training part of the rows.
    The held-out part is used to score the candidates and to fit the soup, which mixes the networks
    of a random search instead of keeping only the best one.

    Parameters
    ----------
    estimator : skorch net
        The net to fine-tune, whose module is an *instance* with the pretrained weights. A module
        class is initialized once for all candidates, with a warning, because soups need pretrained
        weights. If the net is fitted, fine-tuning starts from its weights. Any other estimator that
        has ``module_`` after ``fit`` is fitted as it is; an error is raised if its candidates do
        not start from the same weights. Classifiers must return logits
        (``criterion=nn.CrossEntropyLoss``, or ``NeuralNetBinaryClassifier`` for one logit), or
        ``soup`` has a ``forward`` that makes logits of their probabilities. A
        pipeline is not accepted, because the rows must be preprocessed in the same way for all
        candidates; make the search the last step of a pipeline instead.
    param_distributions : dict or list of dict
        As for ``sklearn.model_selection.ParameterSampler``.
    soup : estimator or None, default=None
        An unfitted soup without checkpoints. None is a `GreedySoup`.
    n_iter : int, default=10
        Number of candidates to sample.
    scoring : str, callable or None, default=None
        Metric for the candidates on the held-out part. None is the ``score`` of the estimator.
    cv : int, splitter, iterable or None, default=None
        Its first split is used for all candidates, because another split would hold out rows on
        which some of them were trained. None holds out 20 %, stratified for classifiers.
    n_jobs : int or None, default=None
        Number of candidates that joblib fine-tunes in parallel, in processes. With joblib's
        threads, which share torch's random state, the results differ from run to run.
    random_state : int, RandomState or None, default=None
        Seed for sampling the candidates, for their training and for splitting the rows. The global
        random state is not changed.
    save_dir : str, path-like or None, default=None
        Folder to which each candidate is written when it is finished. An interrupted search resumes
        from the candidates in it. Changes in the code of the net or its module are not noticed: use
        a new folder after them. None keeps the weights in memory.
    verbose : int, default=0
        Verbosity of joblib, as in ``RandomizedSearchCV``. The net itself reports on training.

    Attributes
    ----------
    soup_ : estimator
        The fitted soup.
    best_estimator_ : estimator
        The same as ``soup_``, under the name used by scikit-learn's searches.
    checkpoints_ : CheckpointCollection
        The candidates that did not fail, ``candidate000``, ..., with their scores on the held-out
        part if the soup uses the same metric.
    cv_results_ : dict of str to ndarray or list
        As in ``RandomizedSearchCV``, with one entry per candidate: ``params``, ``param_*``,
        ``mean_test_score``, ``rank_test_score``, ``mean_fit_time`` (seconds), and ``error``, the
        reason for a failure or None.
    best_index_ : int
        Index of the candidate with the highest held-out score.
    best_score_ : float
        Held-out score of this candidate, not of the soup.
    best_params_ : dict
        Hyperparameters of this candidate.
    classes_ : ndarray of shape (n_outputs,)
        Sorted labels (classification only), in the order of the columns of `predict_proba`.
    n_features_in_ : int
        Number of features seen during `fit`.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the features, if X is a data frame.

    Raises
    ------
    TypeError
        The estimator is a pipeline, or ``sample_weight`` was passed but the scorer does not accept
        it.
    ValueError
        All candidates failed, the candidates did not start from the same weights, or a parameter is
        out of range.
    CheckpointError
        ``save_dir`` contains another search. Nothing is written.

    Warns
    -----
    FitFailedWarning
        Some candidates failed and were left out.
    SoupWarning
        The module is a class, so the initial weights are random.

    See Also
    --------
    CheckpointScorer : Save the candidates of scikit-learn's own searches.

    Notes
    -----
    Cost: ``n_iter`` training runs and one soup. Memory: one network per worker and, without
    ``save_dir``, all candidates. Interrupting the training of skorch ends the current training run
    early, not the search.

    There is no ``refit``: ``RandomizedSearchCV`` refits the best candidate on all rows, while this
    search mixes the candidates. The best one is ``checkpoints_[f"candidate{best_index_:03d}"]``.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Appendix J (the random search).

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skorch import NeuralNetClassifier
    >>> from sksoup.model_selection import SoupSearchCV
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(60, 4)).astype(np.float32)
    >>> y = (X[:, 0] > 0).astype(int)
    >>> start = torch.nn.Linear(4, 2)  # pretrained somewhere
    >>> net = NeuralNetClassifier(start, criterion=torch.nn.CrossEntropyLoss, verbose=0,
    ...                           train_split=None, max_epochs=5)
    >>> search = SoupSearchCV(net, {"lr": [0.05, 0.1, 0.2]}, n_iter=3, random_state=0).fit(X, y)
    >>> len(search.checkpoints_), search.predict(X).shape
    (3, (60,))
    """

    estimator: Any
    param_distributions: Any
    _: KW_ONLY
    soup: Any = None
    n_iter: int = 10
    scoring: Any = None
    cv: Any = None
    n_jobs: int | None = None
    random_state: Any = None
    save_dir: str | os.PathLike[str] | None = None
    verbose: int = 0

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None, groups: Any = None) -> Self:
        """Fine-tune the candidates and mix them.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...), dict or tuple of them, or a Dataset
            Inputs, in the form that the estimator accepts.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
            Labels or targets, in the form that the estimator accepts. None if a Dataset contains
            them.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows. Those of the held-out rows are used for the scores and the soup;
            the others for training if the estimator's ``fit`` accepts them, which skorch nets do
            not.
        groups : array-like of shape (n_samples,) or None, default=None
            Groups of the rows, such as patients, for a ``cv`` that keeps each group in one part,
            such as ``GroupShuffleSplit``.

        Returns
        -------
        self : estimator
            The fitted estimator.
        """
        soup, folder = self._soup(), None if self.save_dir is None else Path(self.save_dir)
        X, y, weight = validate_rows(self, X, y, soup.task, sample_weight)
        X = map_inputs(to_numpy, X)  # nets move inputs to their device
        scorer = check_scoring(self.estimator, self.scoring)
        if weight is not None:
            check_takes_weight(self.estimator, self.scoring)
        start = find_start(self.estimator)
        if start is not None:  # nets need floats in the dtype of their module
            dtype = torch.empty(0, dtype=module_dtype(start)).numpy().dtype
            X = map_inputs(lambda x: x.astype(dtype, copy=False) if x.dtype.kind == "f" else x, X)
        seed = self._seed(folder)
        rng = np.random.RandomState(seed)
        params = list(ParameterSampler(self.param_distributions, self.n_iter, random_state=rng))
        seeds = rng.randint(2**31 - 1, size=len(params))
        train, held_out = self._split(y, groups, rng)
        parts = [
            map_inputs(itemgetter(rows), values) for rows in (train, held_out) for values in (X, y)
        ]
        weights = None if weight is None else (weight[train], weight[held_out])
        rows = list(parts)
        if start is not None:  # raise errors of the soup before hours of training
            one = CheckpointCollection([start], module=start)
            trial = CheckpointEnsemble(  # which mixes nothing
                one, forward=soup.forward, task=soup.task, classes=soup.classes, device=soup.device
            )
            trial.criterion = soup.criterion  # it may leave out labels
            trial.fit(*parts[2:])
            if soup.task == "classification":  # nets need labels as indices of their outputs
                found = [_indices(labels, trial) for labels in parts[1::2]]
                # the loss of one logit needs them in the dtype of the logits
                is_binary = trial.outputs_.one_logit
                rows[1::2] = [labels.astype(dtype) if is_binary else labels for labels in found]
        if folder is not None:
            data = [*parts, *rows[1::2], *(weights or ())]  # classes= gives labels their indices
            claim(folder, make_manifest(self.estimator, self.scoring, seed, params, start, data))
        names = [f"candidate{index:03d}" for index in range(len(params))]
        paths = [None if folder is None else folder / f"{name}.safetensors" for name in names]
        candidates = Parallel(n_jobs=self.n_jobs, verbose=self.verbose)(
            delayed(fine_tune)(self.estimator, p, int(s), start, rows, weights, scorer, path)
            for p, s, path in zip(params, seeds, paths, strict=True)
        )
        self._keep_results(params, candidates)
        self.checkpoints_ = self._collect(
            {n: c for n, c in zip(names, candidates, strict=True) if c.error is None}, start, soup
        )
        held_out_weight = None if weights is None else weights[1]
        soup.fit(self.checkpoints_, *parts[2:], sample_weight=held_out_weight)
        if hasattr(self, "feature_names_in_"):  # the soup was fitted on arrays
            soup.feature_names_in_ = self.feature_names_in_
        self.soup_: BaseSoup = soup
        return self

    def _soup(self) -> Any:
        if not isinstance(self.n_iter, Integral) or self.n_iter < 1:
            raise ValueError(f"n_iter must be an integer >= 1, got {self.n_iter!r}.")
        refuse_pipeline(self.estimator)
        task: Task = "regression" if is_regressor(self.estimator) else "classification"
        soup = GreedySoup(task=task) if self.soup is None else clone(self.soup)
        if soup.checkpoints is not None:
            raise ValueError(
                "soup already has checkpoints, but SoupSearchCV makes its own. Pass a soup without "
                "checkpoints."
            )
        soup._check_params()  # before the training
        if soup.forward is None:
            criterion = getattr(self.estimator, "criterion", None)
            check_net(criterion, soup.task, is_classifier(self.estimator))
        return soup

    def _seed(self, folder: Path | None) -> int:
        """The seed of the search; without random_state that of the search in the folder."""
        if self.random_state is None:
            recorded = recorded_seed(folder)
            entropy = np.random.SeedSequence().generate_state(1)[0]
            return int(entropy) if recorded is None else recorded
        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _split(
        self, y: NDArray[Any], groups: Any, rng: np.random.RandomState
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.cv is None:
            kind = StratifiedShuffleSplit if is_classifier(self.estimator) else ShuffleSplit
            cv = kind(n_splits=1, test_size=0.2, random_state=rng.randint(2**31 - 1))
        else:
            cv = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        train, held_out = next(iter(cv.split(np.zeros((len(y), 1)), y, groups)))
        return train, held_out

    def _keep_results(
        self, params: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate]
    ) -> None:
        scores = np.array([c.score for c in candidates])
        failed = [f"{p}: {c.error}" for p, c in zip(params, candidates, strict=True) if c.error]
        if len(failed) == len(candidates):
            raise ValueError(
                f"All {len(failed)} candidates failed, so there is nothing to mix. The first: "
                f"{failed[0]}"
            )
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(candidates)} candidates failed and are left out. See "
                f"cv_results_['error'] for the reasons. The first: {failed[0]}",
                FitFailedWarning,
                stacklevel=3,  # the call of fit
            )
        names = sorted({name for p in params for name in p})
        ranks = (-np.nan_to_num(scores, nan=-np.inf)).argsort(kind="stable").argsort() + 1
        self.cv_results_: dict[str, Any] = {
            "params": [dict(p) for p in params],
            **{f"param_{name}": [p.get(name) for p in params] for name in names},
            "mean_test_score": scores,
            "rank_test_score": ranks.astype(np.int32),
            "mean_fit_time": np.array([c.fit_time for c in candidates]),
            "error": [c.error for c in candidates],
        }
        self.best_index_ = int(np.nanargmax(scores))
        self.best_score_ = float(scores[self.best_index_])
        self.best_params_ = dict(params[self.best_index_])

    def _collect(
        self, found: Mapping[str, Candidate], start: nn.Module | None, soup: Any
    ) -> CheckpointCollection:
        modules = [start, *(c.module for c in found.values())]
        module = next((m for m in modules if m is not None), None)
        if module is None:
            raise ValueError(
                f"All candidates were found in save_dir, but the architecture of "
                f"{type(self.estimator).__name__} is not known before it is fitted. Delete one of "
                f"the files, so that this candidate is fitted again."
            )
        # the same score on the same rows need not be computed twice
        ranks_alike = soup.scoring is None and getattr(soup, "ranking_fraction", None) is None
        same_score = ranks_alike and self.scoring is None
        collection = CheckpointCollection(
            {name: c.weights for name, c in found.items()},
            module=module,
            scores={name: c.score for name, c in found.items()} if same_score else None,
        )
        if start is None:
            collection.check()
            if strangers := collection.strangers(collection.names):
                raise ValueError(
                    f"The candidates did not start from the same weights: {len(strangers)} of "
                    f"{len(found)} differ in direction from the others, so a soup of them would "
                    f"not work. {type(self.estimator).__name__} seems to initialize its module for "
                    f"every clone. Pass a module instance with pretrained weights."
                )
        return collection

    @property
    def best_estimator_(self) -> BaseSoup:
        """The soup."""
        return self._fitted()

    @property
    def classes_(self) -> NDArray[Any]:
        """Sorted labels."""
        labels: NDArray[Any] = self._fitted().classes_
        return labels

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict with the soup.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)
            Inputs.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Labels or targets.
        """
        return self._fitted().predict(X)

    @available_if(lambda self: not is_regressor(self.estimator))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Predict probabilities with the soup.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)
            Inputs.

        Returns
        -------
        p : ndarray of shape (n_samples, n_outputs), float32
            Columns in the order of ``classes_``.
        """
        probabilities: NDArray[np.float32] = self._fitted().predict_proba(X)
        return probabilities

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Score the soup: accuracy or R².

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)
            Inputs.
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs)
            Labels or targets.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Greater is better.
        """
        return self._fitted().score(X, y, sample_weight)

    def _fitted(self) -> BaseSoup:
        check_is_fitted(self, "soup_")
        return self.soup_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags = inner.classifier_tags
        tags.regressor_tags = inner.regressor_tags
        tags.target_tags.required = True
        tags.target_tags.multi_output = is_regressor(self.estimator)
        return tags


def _indices(labels: NDArray[Any], soup: BaseSoup) -> NDArray[np.int64]:
    """Labels as indices of the outputs."""
    unknown = np.setdiff1d(labels[~soup.outputs_.left_out(labels)], soup.classes_)
    if len(unknown):
        raise ValueError(
            f"The held-out part lacks labels of the training part, such as {unknown[0]!r}. Pass "
            f"classes= to the soup, or a cv whose first split has all labels."
        )
    targets = soup.outputs_.encode(labels, torch.int64, torch.device("cpu"))
    indices: NDArray[np.int64] = soup.outputs_.for_criterion(targets).numpy()
    return indices
