"""The commands that need validation data, too: greedy, learned, mehl, compare."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from sys import stdout
from typing import Any

import torch
from sklearn.callback import ProgressBar
from sklearn.metrics import get_scorer_names
from tqdm import tqdm

from ..checkpoints.collection import CheckpointCollection
from ..data.tokens import shown_score
from ..exceptions import SoupWarning
from ..inspection.comparison import centered_systems, compare_soups, paper_systems
from ..mixing.files import refuse_inputs
from ..recipes.base import BaseSoup
from ..recipes.baselines import BestCheckpoint
from ..recipes.greedy import GreedySoup
from ..recipes.learned import LearnedSoup
from ..recipes.mehl import MEHLSoup
from ..recipes.validation import scorer_of
from .data import Data, load_data
from .files import listed
from .module import load_factory
from .output import check_companions, write_soup
from .weights import Result

RECIPES: Mapping[str, type[BaseSoup]] = {
    "greedy": GreedySoup, "learned": LearnedSoup, "mehl": MEHLSoup,
}  # fmt: skip
METRICS = {"regression": "R²", "language-modeling": "log-likelihood"}  # else accuracy
OPTIMISTIC = (
    "The checkpoints and their coefficients were selected on the validation data, so scores on it "
    "are optimistic: report scores on other data (--test FILE)."
)


def search(options: argparse.Namespace) -> Result:
    """Fit the soup that the command is named after, and write it."""
    collection = _opened(options)
    refuse_inputs(Path(options.output), collection, collection)
    val, test, tokenizer, classes = load_data(options, collection)
    check_companions(Path(options.output), collection, tokenizer)
    soup = RECIPES[options.command]()
    soup.set_params(**_params(soup, options, classes))
    if stdout.isatty() and not options.json and find_spec("rich"):
        soup.set_callbacks(ProgressBar())
    soup.fit(collection, val.X, val.y)
    write_soup(Path(options.output), soup, tokenizer)
    if test is not None:
        best = _best_checkpoint(soup, options, classes, val)
        try:
            return False, *_summary(options, soup, best, val, test)
        except (ValueError, RuntimeError) as error:  # such as a metric of a class without examples
            warnings.warn(
                f"{options.output!r} was written, but can't be scored on {options.test!r}: {error}",
                SoupWarning,
                stacklevel=2,
            )
    return False, *_summary(options, soup, None, val, None)


def compare(options: argparse.Namespace) -> Result:
    """Fit all systems, or those asked for, and show their scores."""
    collection = _opened(options)
    val, test, _, classes = load_data(options, collection)
    # the first is what the others are compared with
    chosen = list(dict.fromkeys(["Best checkpoint", *(options.system or systems(1))]))
    recipes = systems(len(collection), options.task, options.random_state or 0)
    recipes = {name: soup for name, soup in recipes.items() if name in chosen}
    for soup in recipes.values():
        given = _params(soup, options, classes)
        soup.set_params(**{n: v for n, v in given.items() if n not in ("scoring", "random_state")})
    tested = (None, None) if test is None else (test.X, test.y)
    with (
        tqdm(total=len(recipes), unit="system", disable=None, leave=False) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", SoupWarning)  # they are kept, and shown below
        found = compare_soups(
            collection, val.X, val.y, *tested, recipes=recipes, scoring=options.scoring,
            n_repeats=options.repeats, measure_memory=options.measure_memory,
            on_result=lambda result: bar.update(),
        )  # fmt: skip
    _warn_by_method(found.soups)
    return False, {"results": [asdict(result) for result in found.results]}, str(found)


def _warn_by_method(soups: Mapping[str, BaseSoup]) -> None:
    """Show each warning of the fits once, with the methods that gave it."""
    methods: dict[str, list[str]] = {}
    for name, soup in soups.items():
        for message in soup.warnings_:
            methods.setdefault(message, []).append(name)
    for message, names in methods.items():
        who = "all methods" if len(names) == len(soups) else ", ".join(names)
        warnings.warn(f"{who}: {message}", SoupWarning, stacklevel=2)


def systems(
    n_checkpoints: int, task: Any = "classification", random_state: int = 0
) -> dict[str, BaseSoup]:
    """What compare fits, by name."""
    seed: dict[str, Any] = {"task": task, "random_state": random_state}
    return {**paper_systems(n_checkpoints, **seed), **centered_systems(n_checkpoints, **seed)}


def _opened(options: argparse.Namespace) -> CheckpointCollection:
    """The checkpoints with their network; an error where there is none, or no such device."""
    if options.module is not None and options.base is not None:
        raise ValueError("--module and --base can't be given together: both name the network.")
    _check_device(options.device)
    _check_scoring(getattr(options, "scoring", None))
    module = options.base if options.module is None else load_factory(options.module)
    collection = CheckpointCollection.from_path(
        options.sources, which=options.which, module=module, key=options.key, prefix=options.prefix
    )
    if collection.module is None:
        raise ValueError(
            f"{options.sources[0]!r} holds weights without the network that they belong to: there "
            f"is no config.json of Hugging Face beside them. Give --module package.module:factory, "
            f"a class or a function of yours that returns the network."
        )
    return collection.healthy() if options.healthy else collection


def _check_device(device: str | None) -> None:
    if device in (None, "auto"):
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} can't be used here: {first.rstrip('.')}. Give --device cpu, or "
            f"leave it out."
        ) from error


def _check_scoring(scoring: str | None) -> None:
    if scoring is not None and scoring not in (names := get_scorer_names()):
        near = get_close_matches(scoring, names, n=3)
        raise ValueError(
            f"--scoring {scoring!r} is no metric of scikit-learn: expected one of "
            f"sklearn.metrics.get_scorer_names(), such as "
            f"{listed(near or ['f1_macro', 'balanced_accuracy'])}."
        )


def _params(
    soup: BaseSoup, options: argparse.Namespace, classes: list[Any] | None
) -> dict[str, Any]:
    """The parameters of a soup that were given as options."""
    names = soup.get_params(deep=False).keys() - {"checkpoints", "classes"}
    given = {name: getattr(options, name, None) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if found.get("model_batch_size") == "all":
        found["model_batch_size"] = None
    return found if classes is None else {**found, "classes": classes}


def _best_checkpoint(
    soup: BaseSoup, options: argparse.Namespace, classes: list[Any] | None, val: Data
) -> BestCheckpoint:
    """The best checkpoint on the validation data, by the scores of the search if it has all."""
    best = BestCheckpoint()
    best.set_params(**_params(best, options, classes))
    known = getattr(soup, "individual_scores_", None)
    checkpoints = CheckpointCollection(soup.checkpoints_, scores=known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)  # those of the search were shown
        return best.fit(checkpoints, val.X, val.y)


def _summary(
    options: argparse.Namespace, soup: Any, best: Any, val: Data, test: Data | None
) -> tuple[dict[str, Any], str]:
    """What was found, for JSON and as text."""
    scoring = getattr(options, "scoring", None)
    metric = scoring or METRICS.get(options.task, "accuracy")
    score = scorer_of(soup, scoring)
    sets = {"validation": val} | ({} if test is None else {"test": test})
    scores = {name: float(score(soup, data.X, data.y)) for name, data in sets.items()}
    first, is_best = _ranked_first(soup, val) if best is None else (None, True)
    of_first = {
        name: first if best is None else float(score(best, data.X, data.y))
        for name, data in sets.items()
    }
    who = "best checkpoint" if is_best else "checkpoint ranked first"
    task = options.task if scoring is None else None
    lines = [
        f"{options.output}: {type(soup).__name__}, {len(soup.ingredients_)} of "
        f"{len(soup.checkpoints_)} checkpoints mixed"
    ]
    for name, value in scores.items():
        line = f"{metric} on the {sets[name].n:,} {name} examples: {shown_score(value, task)}"
        if (other := of_first[name]) is not None:
            line += f" ({who}: {shown_score(other, task)})"
        lines.append(line)
    found = {
        "output": options.output,
        "method": type(soup).__name__,
        "ingredients": len(soup.ingredients_),
        "names": list(soup.ingredients_),
        "checkpoints": len(soup.checkpoints_),
        "metric": metric,
        "scores": scores,
        "n_examples": {name: data.n for name, data in sets.items()},
        "best_checkpoint": of_first if is_best else dict.fromkeys(sets),
        "recalibrated": list(soup.recalibrated_),
    }
    if test is None:
        lines.append(OPTIMISTIC)
    else:
        lines.append("`sksoup compare` tells whether a difference is more than chance.")
    return found, "\n".join(lines)


def _ranked_first(soup: Any, val: Data) -> tuple[float | None, bool]:
    """The score of the checkpoint that the search ranked first, and whether it is the best one.

    Learned soups rank on some of the validation data, and score only the first one on all of them.
    """
    if known := getattr(soup, "individual_scores_", None):
        return float(max(known.values())), True
    compared = getattr(soup, "held_out_scores_", {})
    rows = getattr(soup, "ranking_rows", None)
    is_on_all = soup.checkpoints_.scores is None and (rows is None or rows >= val.n)
    # where the center is that checkpoint it is not listed twice
    return compared.get("best", compared.get("center")), is_on_all
