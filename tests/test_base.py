"""The recipe on the documentation's page "A new recipe" works."""

from __future__ import annotations

# [recipe]
import numpy as np

from sksoup.base import BaseSoup, Found, Problem, rank_checkpoints


class TopSoup(BaseSoup):
    """Average the n checkpoints with the highest held-out scores."""

    def __init__(self, checkpoints=None, *, n=3, task="classification", classes=None,
                 batch_size=128, device="auto"):  # fmt: skip
        self.checkpoints = checkpoints
        self.n = n
        self.task = task
        self.classes = classes
        self.batch_size = batch_size
        self.device = device

    def _search(self, problem: Problem) -> Found:
        with problem.progress("evaluation", len(problem.checkpoints)) as step:
            scores = rank_checkpoints(problem, step).scores
        best = sorted(scores, key=scores.get, reverse=True)[: self.n]
        coef = np.array([[(name in best) / self.n for name in problem.checkpoints]])
        return Found(coef, attributes={"ingredients_": tuple(best)})


# [end]


def test_a_recipe_in_one_file(zoo):
    soup = TopSoup(n=2).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert sorted(soup.coef_)[-3:] == [0, 0.5, 0.5]
    assert soup.recipe_.cook(zoo.checkpoints).keys() == soup.state_dict().keys()
    assert len(soup.ingredients_) == 2


class FirstTwo(BaseSoup):
    """A recipe without a parameter: those of all recipes have defaults."""

    def _search(self, problem: Problem) -> Found:
        coef = np.zeros((1, len(problem.checkpoints)))
        coef[0, :2] = 0.5
        return Found(coef)


def test_a_recipe_needs_no_parameter(zoo):
    soup = FirstTwo().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.coef_.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0]
    assert 0 <= soup.score(zoo.X, zoo.y) <= 1
