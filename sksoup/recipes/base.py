"""The base class of all soups: validation, both forms of `fit`, and fitted attributes."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import platform
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, metadata, version
from numbers import Integral
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.callback import with_callbacks
from sklearn.utils import ClassifierTags, RegressorTags, Tags, check_scalar
from sklearn.utils.validation import check_is_fitted

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.survey import judge_soups
from ..data.outputs import TASKS, Task
from ..data.tokens import TEXT_TASKS
from ..engine.batch_norm import POLICIES, BatchNormPolicy, check_policy, settle
from ..engine.objective import Criterion, Forward, load_weights
from ..engine.precision import judge_bfloat16
from ..engine.probabilities import check_criterion
from ..engine.problem import Found, Problem
from ..engine.scores import Evaluator
from ..engine.tied import check_tied
from ..mixing.layers import Layerwise
from ..mixing.mix import check_range, mix
from ..mixing.recipe import Recipe
from ..runtime.cache import open_cache
from ..runtime.copies import copied
from ..runtime.distributed import agreed, broadcast, naming_lost_ranks, rank, world_size
from ..runtime.shards import refuse_copy
from .export import ExportMixin
from .fit_warnings import WarningMixin
from .prediction import PredictionMixin
from .progress import ProgressMixin
from .start import Start, name_of_start, with_start
from .validation import (
    check_choice,
    check_finite,
    check_flag,
    check_ranks,
    check_sharded,
    collect,
    prepare_problem,
    scored_by,
    validate_rows,
)

NOT_IN_RECIPES = ("checkpoints", "memory")  # parameters that do not change the result
PLAIN = (bool, int, float, str)  # types that JSON can represent
PACKAGES = ("sksoup", "torch", "numpy", "scikit-learn", "safetensors")


def two_forms(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``fit`` be called with or without checkpoints; scikit-learn sees the form without."""

    @functools.wraps(fit)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "checkpoints" in kwargs:
            return fit(self, kwargs.pop("checkpoints"), *args, **kwargs)
        n_data = 0 if "X" in kwargs else 1 if "y" in kwargs else 2  # positions left for X and y
        if len(args) > n_data or (args and isinstance(args[0], CheckpointCollection)):
            return fit(self, *args, **kwargs)
        return fit(self, self.checkpoints, *args, **kwargs)

    signature = inspect.signature(fit)
    seen = [p for name, p in signature.parameters.items() if name != "checkpoints"]
    wrapper.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
    return wrapper


class DocLinkMixin:
    """Links in scikit-learn's HTML display, if the package metadata has a documentation URL."""

    _doc_link_module = "sksoup"

    @property
    def _doc_link_template(self) -> str:
        entries: list[str] = []
        with suppress(PackageNotFoundError):  # run from a folder that was never installed
            entries = metadata("sksoup").get_all("Project-URL") or []
        urls = dict(entry.split(", ", 1) for entry in entries)
        base: str | None = urls.get("Documentation")
        return "" if base is None else f"{base.rstrip('/')}/generated/{{name}}.html"

    def _doc_link_url_param_generator(self) -> dict[str, str]:
        place = type(self).__module__.split(".")[1]
        public = "sksoup" if place == "recipes" else f"sksoup.{place}"
        return {"name": f"{public}.{type(self).__name__}"}


class BaseSoup(
    DocLinkMixin,
    PredictionMixin,
    ExportMixin,
    WarningMixin,
    ProgressMixin,
    BaseEstimator,  # type: ignore[misc]
):
    """Base class of all soups: everything except the search for coefficients.

    A recipe is a subclass with its parameters in ``__init__`` and one method, ``_search``, that
    takes a `Problem` and returns a `Found` with the coefficients. The parameters below have
    defaults here; a recipe lists those that it offers.

    Attributes
    ----------
    coef_ : ndarray of shape (n_checkpoints,) or (n_layers, n_checkpoints), float64
        Coefficients; rows sum to 1.
    module_ : nn.Module
        The soup, in eval mode, on the device.
    recipe_ : Recipe
        Record of the soup, which `save` writes.
    """

    checkpoints: Any = None
    task: Task = "classification"
    classes: ArrayLike | None = None
    batch_size: int | None = 128
    device: str | torch.device = "auto"
    layerwise: Layerwise = False
    criterion: Criterion | None = None
    forward: Forward | None = None
    batch_norm: BatchNormPolicy = "average"
    precision: str = "fp32"
    compile: bool = False
    scoring: Any = None
    shard: str | None = None
    memory: Any = None

    _has_recipe = True  # False for an ensemble, which mixes nothing

    # ------------------------------------------------------------------ fit

    @overload
    def fit(
        self, checkpoints: Any, X: Any, y: Any = None, *, sample_weight: Any = None
    ) -> Self: ...

    @overload
    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> Self: ...

    @two_forms
    @with_callbacks  # type: ignore[untyped-decorator]
    def fit(self, checkpoints: Any, X: Any, y: Any = None, *, sample_weight: Any = None) -> Self:
        """Find the coefficients on held-out data and mix the soup.

        Called as ``fit(checkpoints, X, y)``, or as ``fit(X, y)`` if the checkpoints were passed to
        the constructor.

        Parameters
        ----------
        checkpoints : CheckpointCollection, callable or iterable
            Checkpoints to mix. A callable ``(X, y) -> CheckpointCollection`` makes them from the
            data; ``sample_weight`` is passed to it if it has a parameter of that name. By default
            the ``checkpoints`` of the constructor.
        X : array-like, Tensor, dict or tuple of them, Dataset or DataLoader
            Held-out inputs of shape (n_samples, ...). A dict is passed to the module by name, a
            tuple by position. Floating-point inputs are converted to the dtype of the module. A
            torch ``Dataset``, a ``DataLoader``, a ``datasets.Dataset``, an array in a file
            (``np.memmap``) or an iterator of batches is read once and kept in memory in its own
            dtype. Rows or batches with several inputs are ``(a, b, y)``, ``((a, b), y)`` or
            ``({"a": a, "b": b}, y)``. Data that does not fit into half of the free memory is read
            by index when it is needed, with the workers of the ``DataLoader``; this requires a
            fixed order (``shuffle=False``, not an iterator).
        y : array-like or Tensor of shape (n_samples,) or (n_samples, n_outputs), default=None
            Held-out labels or targets. If the module returns (n_samples, n_outputs, ...), as for
            pixels or tokens, integer labels of shape (n_samples, ...): indices of the outputs
            unless ``classes`` is passed, with -100 (or the ``ignore_index`` of ``criterion``) at
            positions to ignore; for one logit per pixel, (n_samples, 1, ...), a mask of 0 and 1.
            None if the batches contain them, as the second item of a pair or under the key
            ``labels`` of a mapping; a string names another key.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows in the loss and in the held-out score.

        Returns
        -------
        self : estimator
            The fitted estimator.

        Raises
        ------
        CheckpointError
            The checkpoints can't be opened, do not match each other or the module, or contain NaN.
        ValueError
            X, y and the parameters are invalid or inconsistent.
        TypeError
            A boolean parameter is neither True nor False, or X contains checkpoints.
        DivergenceError
            The loss or the coefficients became NaN or infinite.

        Warns
        -----
        SoupWarning
            There is only one checkpoint; there are few held-out rows for so many checkpoints; no
            checkpoint is better than chance on them; checkpoints look unrelated; the module returns
            probabilities instead of logits; or labels may not be those of the outputs: numbers as
            strings, or integers without a 0. All messages are kept in ``warnings_``.

        Notes
        -----
        ``soup.set_callbacks(sklearn.callback.ProgressBar())`` before `fit` shows a progress bar in
        a terminal or a notebook (extra ``progress``). At its start, a search logs its number of
        steps to the logger ``"sksoup"`` at level INFO.
        """
        self._forget()
        try:
            self.warnings_: tuple[str, ...] = ()
            self._check_params()
            with agreed(world_size() > 1):
                X, y, weight = validate_rows(self, X, y, self.task, sample_weight)
                collection = collect(checkpoints, X, y, weight, type(self).__name__)
            if world_size() > 1:
                check_ranks(collection, X, y, weight)
            with (
                collection.threads_of_parent(), naming_lost_ranks(),
                torch.inference_mode(False), torch.enable_grad(),  # wherever fit is called from
            ):  # fmt: skip
                problem = self._problem(collection, X, y, weight)
                hashes = self._has_recipe and not rank()  # rank 0 hashes for all ranks
                with collection.hashing() if hashes else nullcontext():
                    self._keep(problem, self._search(problem))
        except BaseException:
            self._forget()
            raise
        return self

    @abstractmethod
    def _search(self, problem: Problem) -> Found:
        """Find the coefficients: the only method that a recipe must define."""

    def _check_params(self) -> None:
        """Check the parameters that all recipes share; recipes add their own."""
        check_choice(self.task, "task", TASKS)
        check_criterion(self.criterion, self.task)
        check_choice(self.batch_norm, "batch_norm", POLICIES)
        check_flag(self.compile, "compile")
        check_choice(self.shard, "shard", (None, "auto"))
        if not (isinstance(self.layerwise, (bool, np.bool_)) or callable(self.layerwise)):
            raise TypeError(
                f"layerwise must be True, False or a callable that maps a parameter's name to the "
                f"label of its layer, got {self.layerwise!r}."
            )
        if self.batch_size is not None:
            check_scalar(self.batch_size, "batch_size", Integral, min_val=1)
        if self.forward is not None and not callable(self.forward):
            raise TypeError(
                f"forward must be a callable (module, X) or None, got {self.forward!r}."
            )
        if self.memory is not None:  # raises before any work is done
            open_cache(self.memory)

    def _problem(
        self, collection: CheckpointCollection, X: Any, y: Any, weight: NDArray[np.float64] | None
    ) -> Problem:
        """The problem with this soup's metric and callbacks; also sets ``outputs_``."""
        data = {"X": X, "y": y, "metadata": {} if weight is None else {"sample_weight": weight}}
        problem = prepare_problem(
            collection, X, y, weight,
            task=self.task, classes=self.classes, criterion=self.criterion, forward=self.forward,
            layerwise=self.layerwise, batch_size=self.batch_size, device=self.device,
            precision=self.precision, compile=self.compile, shard=self.shard,
            cache=None if self.memory is None else open_cache(self.memory),
            progress=functools.partial(self._progress, data),
        )  # fmt: skip
        check_sharded(self, problem)
        if self._has_recipe and len(collection) == 1:
            self._warn(
                f"There is one checkpoint only, {collection.names[0]!r}, so there is nothing to "
                f"mix or to select, and the soup equals that checkpoint. Pass several checkpoints."
            )
        soups = collection.soups() if self._has_recipe else []
        if soups and (said := judge_soups(soups, len(collection))):
            self._warn(said)
        if problem.doubt is not None:
            self._warn(problem.doubt)
        self.outputs_ = problem.objective.outputs
        if self.outputs_.labels is not None:
            self.classes_: Any = self.outputs_.labels
        if self.classes is None:
            self._warn_of_labels(self.outputs_, problem.evaluate.y)
        if self.batch_norm == "recalibrate":
            check_policy(problem, self.batch_size)
        is_slow = judge_bfloat16(problem.data.y.device) if self.precision == "bf16" else None
        if is_slow is not None:
            self._warn(is_slow)
        if self.scoring is not None:
            problem = scored_by(self._fitted_view(problem), self.scoring, problem, X)
        return problem

    def _fitted_view(self, problem: Problem) -> Any:
        """A fitted soup for scikit-learn's scorers, without checkpoints and callbacks."""
        soup = copy.copy(self)
        for name in [name for name in vars(self) if "callback" in name]:
            delattr(soup, name)
        soup.checkpoints, soup.module_, soup.coef_ = None, problem.objective.module, None
        return soup

    def _keep(self, problem: Problem, found: Found) -> None:
        """Set the fitted attributes; the soup is mixed from the coefficients only."""
        layers, collection = problem.layers, problem.checkpoints.whole
        for name, value in found.attributes.items():
            setattr(self, name, value)
        best = self._mix_best(problem, found) if self._has_recipe else found.coef
        coef = layers.expand(best)
        self.coef_ = coef if self.layerwise else coef[0]
        self.layers_ = dict(layers.rows)
        self.layer_names_ = layers.names
        ingredients = tuple(n for n, c in zip(collection, coef.T, strict=True) if c.any())
        self.ingredients_ = found.attributes.get("ingredients_", ingredients)
        self.checkpoints_ = collection
        self.history_ = found.history
        self.counts_ = problem.objective.counts
        if self._has_recipe:
            self._keep_soup(problem, coef, self._held_out(problem, found))
        if found.decided is not None:
            evaluate, decided = found.decided
            self._warn_of_rounding(self._score_of(problem, best, evaluate), decided)

    def _mix_best(self, problem: Problem, found: Found) -> NDArray[np.float64]:
        """Mix the result, or a rival that scores higher on all held-out rows; return its coef."""
        if not found.rivals:
            self._mix(problem, found.coef)
            return found.coef
        candidates = {**found.rivals, "soup": found.coef}  # the soup last: it usually wins
        mixed: list[str] = []

        def mix_it(name: str) -> None:
            self._mix(problem, candidates[name])
            mixed.append(name)

        scores = {
            name: self._score_of(
                problem, coef, problem.evaluate, prepare=functools.partial(mix_it, name)
            )
            for name, coef in candidates.items()
        }
        best = max(reversed(scores), key=scores.__getitem__)  # ties go to the soup
        if best != "soup":
            what = {"center": "center from which the search started", "best": "best checkpoint"}
            self._warn(
                f"The soup is the {what[best]}: it scores {scores[best]:.4f} on the held-out rows, "
                f"and the result of the search {scores['soup']:.4f} (see held_out_scores_)."
            )
            if "temperature_" in found.attributes:
                self.temperature_ = 1.0  # the learned one belongs to the result of the search
        if mixed[-1:] != [best]:
            mix_it(best)
        self.held_out_scores_ = dict(reversed(scores.items()))
        return candidates[best]

    def _score_of(
        self,
        problem: Problem,
        coef: NDArray[np.float64],
        evaluate: Evaluator,
        prepare: Callable[[], None] = lambda: None,
    ) -> float:
        """The score of a mix; ``prepare`` makes the mix if the cache does not have its score."""

        def score() -> float:
            prepare()
            return evaluate().score

        if evaluate.cache is None:  # avoids hashing checkpoints in memory
            return score()
        collection = problem.checkpoints
        identities = [collection.identity(name) for name in collection]
        key = "mix", identities, problem.layers.rows, coef, self.batch_norm
        return evaluate.cache(key, score)

    def _mix(self, problem: Problem, searched: NDArray[np.float64]) -> None:
        """Load the mix with these coefficients into the module and set BatchNorm's statistics."""
        coef = problem.layers.expand(searched)
        weights = mix(problem.checkpoints, coef, layers=problem.layers.rows)
        load_weights(problem.module, weights)
        self._dtypes = {name: w.dtype for name, w in weights.items()}
        settles = self.batch_norm != "average" and np.count_nonzero(coef.any(axis=0)) > 1
        self.recalibrated_ = settle(problem, self.batch_norm, self.batch_size) if settles else ()
        state = problem.module.state_dict()
        for name in self.recalibrated_:  # in dtypes as those of the checkpoints
            check_range(name, state[name], self._dtypes[name])

    def _held_out(self, problem: Problem, found: Found) -> tuple[float, int] | None:
        """The soup's score on the rows that it was selected on and their number, if measured."""
        if found.rivals:
            return float(max(self.held_out_scores_.values())), len(problem.evaluate.data)
        if found.decided is not None:
            evaluate, score = found.decided
            return float(score), len(evaluate.data)
        return None

    def _keep_soup(
        self, problem: Problem, coef: NDArray[np.float64], held_out: tuple[float, int] | None
    ) -> None:
        collection = problem.checkpoints.whole
        self._warn_of_strangers(problem.checkpoints, self.ingredients_)
        if (coef < 0).any():
            self._warn_of_variances(problem, coef)
        self.module_ = problem.module
        params = self.get_params(deep=False)
        if "start" in params:  # by its name, not its path or all of its values
            params["start"] = name_of_start(collection, params["start"])
        scores = getattr(self, "individual_scores_", {})  # those of diverged runs may be -inf
        self.recipe_ = broadcast(rank() or Recipe.record(  # only one rank hashes the files
            type(self).__name__,
            collection,
            coef,
            layers=self.layers_,
            layer_names=self.layer_names_,
            params=as_json({k: v for k, v in params.items() if k not in NOT_IN_RECIPES}),
            scores=as_json({name: s for name, s in scores.items() if math.isfinite(s)}),
            temperature=float(getattr(self, "temperature_", 1.0)),
            recalibrated=self.recalibrated_,
            versions=dict(versions()),
            classes=_labels(self.outputs_.described),
            held_out=held_out if held_out and math.isfinite(held_out[0]) else None,
        ))  # fmt: skip

    def interpolate(self, start: Start, t: float) -> Self:
        """Interpolate between the pretrained weights and this soup (WiSE-FT).

        The result has the weights ``(1 - t) w_0 + t w``. It is often better under distribution
        shift, where the pretrained model is more robust than the fine-tuned ones.

        Parameters
        ----------
        start : str, path-like, mapping of str to Tensor, or nn.Module
            The pretrained weights :math:`w_0`: the name of a checkpoint in ``checkpoints_``, or a
            file, folder, state dict or module, which is added to it as "start".
        t : float
            Position between the pretrained weights (0) and this soup (1). Other values extrapolate.

        Returns
        -------
        soup : estimator
            A fitted copy with its own ``module_``, ``coef_``, ``checkpoints_`` and ``recipe_``;
            other attributes, such as ``history_``, are those of this soup. BatchNorm statistics
            that were re-estimated are mixed with those of the start, as in `interpolation_path`.

        Raises
        ------
        ValueError
            ``t`` is not finite, or the collection already has another checkpoint named "start".
        CheckpointError
            ``start`` can't be opened, or its tensors differ.
        TypeError
            An ensemble has no weights to interpolate.

        See Also
        --------
        sksoup.inspection.interpolation_path : Scores for several values of ``t``.

        References
        ----------
        Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022, arXiv:2109.01903.
        """
        check_is_fitted(self, "coef_")
        check_finite(t, "t")
        if not self._has_recipe:
            raise TypeError("An ensemble has no weights to interpolate. Fit a soup instead.")
        refuse_copy(self.module_)
        checkpoints = with_start(self.checkpoints_, start)
        name = name_of_start(self.checkpoints_, start)
        check_tied(self.module_, checkpoints.select([name]))
        own = t * np.atleast_2d(self.coef_)
        coef = np.zeros((len(own), len(checkpoints)))
        coef[:, : own.shape[1]] = own
        coef[:, checkpoints.names.index(name)] += 1 - t
        soup = copy.copy(self)
        soup.checkpoints_ = checkpoints
        soup.coef_ = coef if self.coef_.ndim == 2 else coef[0]
        soup.ingredients_ = tuple(n for n, c in zip(checkpoints, coef.T, strict=True) if c.any())
        soup.layers_ = {n: row for n, row in self.layers_.items() if n in checkpoints.layout}
        weights = mix(checkpoints, coef, layers=soup.layers_)
        if self.recalibrated_:
            states = checkpoints[name], self.state_dict()
            ends = [{n: state[n] for n in self.recalibrated_} for state in states]
            weights |= mix(ends, [1 - t, t])
        soup.module_ = copied(self.module_)
        load_weights(soup.module_, weights)
        soup._dtypes = {n: w.dtype for n, w in weights.items()}
        recipe = self.recipe_
        soup.recipe_ = Recipe.record(
            recipe.method, checkpoints, coef, layers=soup.layers_, layer_names=self.layer_names_,
            params={**recipe.params, "interpolated_from": name, "t": float(t)},
            scores=recipe.scores, temperature=recipe.temperature, versions=recipe.versions,
            classes=recipe.classes, recalibrated=self.recalibrated_,
        )  # fmt: skip
        return soup

    def _forget(self) -> None:
        """Remove fitted attributes, so that a failed fit does not leave a mixture of two fits."""
        for name in [name for name in vars(self) if name.endswith("_") and name[0] != "_"]:
            delattr(self, name)

    # -------------------------------------------------------------- scikit-learn

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = self.task != "classification"
        tags.input_tags.three_d_array = True
        if self.task in TEXT_TASKS:  # targets are neither labels of rows nor numbers
            tags.target_tags.multi_output, tags.target_tags.required = True, False
            return tags
        if self.task == "regression":
            tags.estimator_type = "regressor"
            tags.regressor_tags = RegressorTags()
        else:
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags(multi_label=self.task == "multilabel")
        return tags


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of the packages that computed a soup."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # not installed, run from a source folder
            found[package] = version(package)
    return found


def _labels(classes: Any) -> tuple[Any, ...]:
    """Labels of the outputs, if JSON can represent them."""
    labels = np.asarray(classes).tolist()
    return tuple(labels) if all(isinstance(label, PLAIN) for label in labels) else ()


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that JSON can represent; others are replaced by their repr."""
    items = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    return {k: v if v is None or isinstance(v, PLAIN) else repr(v) for k, v in items.items()}
