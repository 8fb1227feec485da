"""Loaders that pad nothing, mask nothing, or give another order each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sksoup import BestCheckpoint, CheckpointCollection, GreedySoup, UniformSoup
from sksoup.inspection import compare_soups

from ..zoo import Zoo


class Tiny(nn.Module):
    """Logits of 7 words from a word and the mean of those before it that are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.words(input_ids) * mask[..., None]
        return self.head(hidden.cumsum(1) / mask.cumsum(1).clamp_min(1)[..., None])


def collection() -> CheckpointCollection:
    torch.manual_seed(0)
    return CheckpointCollection([Tiny() for _ in range(2)], module=Tiny)


def loader(lengths: list[int], with_mask: bool = False) -> DataLoader:
    """One text in a batch."""
    rows = [torch.arange(n) * (k + 2) % 6 + 1 for k, n in enumerate(lengths)]

    def collate(texts):
        ids = torch.stack(texts)
        return {"input_ids": ids, **({"attention_mask": ids * 0 + 1} if with_mask else {})}

    return DataLoader(rows, batch_size=1, collate_fn=collate)


@pytest.mark.parametrize("fitted", [[4, 6, 6, 5], [5, 5, 5, 5], [6, 5, 5, 4, 4]])
@pytest.mark.parametrize("tested", [[4, 6, 6, 5], [5, 5, 5, 5], [3, 3, 8]])
@pytest.mark.parametrize("batch_size", [1, 2, 8, None])
def test_texts_without_a_mask_are_fitted_scored_and_predicted(fitted, tested, batch_size):
    soup = GreedySoup(task="causal-lm", batch_size=batch_size).fit(collection(), loader(fitted))
    assert soup.input_names_ == ("input_ids",)
    one_by_one = [soup.predict(batch)[0] for batch in loader(tested)]
    predicted = soup.predict(loader(tested))
    for row, found in zip(one_by_one, predicted, strict=True):
        np.testing.assert_array_equal(found[: len(row)], row)
    n_labels = np.array(tested) - 1
    scores = [soup.score(batch) for batch in loader(tested)]
    assert soup.score(loader(tested)) == pytest.approx(np.average(scores, weights=n_labels))
    assert soup.score(loader(tested, with_mask=True)) == pytest.approx(soup.score(loader(tested)))


def test_a_mask_that_fit_was_given_stays_required():
    soup = GreedySoup(task="causal-lm").fit(collection(), loader([4, 6, 5], with_mask=True))
    with pytest.raises(ValueError, match=r"different inputs than in fit.*'attention_mask'"):
        soup.predict(next(iter(loader([5]))))


def shuffled(rows) -> DataLoader:
    """Another order each time, whatever the global random state is."""
    return DataLoader(rows, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scoring", [None, "f1_macro", "neg_log_loss"])
def test_test_rows_in_another_order_each_time_are_not_paired(zoo: Zoo, scoring):
    X, y = torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)
    recipes = {"best": BestCheckpoint(), "mean": UniformSoup()}

    def compare(test, recipes):
        return compare_soups(
            zoo.checkpoints, X, y, test, recipes=recipes, scoring=scoring, measure_memory=False
        ).results

    one_order = DataLoader(TensorDataset(X, y), batch_size=8)
    expected = compare({"one": (X, y)}, recipes)[-1]
    assert compare({"one": (one_order, None)}, recipes)[-1].p_value == pytest.approx(
        expected.p_value
    )
    with pytest.raises(ValueError, match=r"(test set 'one'.*in another|the) order.*shuffle=False"):
        compare({"one": (shuffled(TensorDataset(X, y)), None)}, recipes)
    if scoring is None:  # where nothing is paired, the order does not matter
        (mean,) = compare({"one": (shuffled(TensorDataset(X, y)), None)}, {"mean": UniformSoup()})
        assert mean.test == pytest.approx(expected.test)


def test_test_texts_in_another_order_each_time_are_not_paired():
    rows = loader([4] * 12).dataset
    recipes = {
        "best": BestCheckpoint(task="causal-lm"), "mean": UniformSoup(task="causal-lm"),
    }  # fmt: skip
    test = DataLoader(rows, batch_size=1, shuffle=True, generator=torch.Generator().manual_seed(0),
                      collate_fn=lambda texts: {"input_ids": torch.stack(texts)})  # fmt: skip
    ids = next(iter(loader([4])))
    with pytest.raises(ValueError, match="in another order"):
        compare_soups(collection(), ids, None, {"test": (test, None)}, recipes=recipes,
                      measure_memory=False)  # fmt: skip
