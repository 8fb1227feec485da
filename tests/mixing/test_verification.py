"""A soup is compared with its recipe, tensor by tensor."""

from __future__ import annotations

import dataclasses

import torch

from sksoup import GreedySoup, MEHLSoup, UniformSoup

from ..zoo import Zoo


def test_verify_says_what_differs_and_what_can_not_be_checked(files, zoo: Zoo):
    soup = MEHLSoup(layerwise=True, random_state=0).fit(files, zoo.X, zoo.y)
    recipe, weights = soup.recipe_, soup.state_dict()
    findings = recipe.verify(weights, files)
    assert findings.ok
    assert str(findings).startswith(f"Verified: {len(weights)} of {len(weights)} tensors")
    weights["head.bias"][0] += 1e-3
    weights["hidden.bias"] = weights["hidden.bias"].double()
    del weights["norm.weight"]
    weights["extra"] = torch.ones(1)
    findings = recipe.verify(weights, files)
    assert not findings.ok
    assert findings.differing == {
        "extra": "is not in the recipe",
        "norm.weight": "is missing",
        "head.bias": "has other values",
        "hidden.bias": "is torch.float64 of shape (6,), expected torch.float32 of (6,)",
    }
    assert f"NOT verified: {len(recipe.layers) - 3} of {len(recipe.layers)}" in str(findings)
    assert findings.to_dict()["ok"] is False


def test_what_was_re_estimated_is_not_checked(files, zoo: Zoo):
    soup = UniformSoup().fit(files, zoo.X, zoo.y)
    recipe = dataclasses.replace(soup.recipe_, recalibrated=("norm.running_mean",))
    weights = soup.state_dict()
    weights["norm.running_mean"] += 1
    findings = recipe.verify(weights, files)
    assert findings.ok
    assert list(findings.unchecked) == ["norm.running_mean"]
    assert "not checked: 'norm.running_mean' was re-estimated from data" in str(findings)


def test_a_missing_ingredient_is_named_unless_it_has_no_part(files, zoo: Zoo):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    unused = [name for name in files if name not in soup.ingredients_]
    findings = soup.recipe_.verify(soup.state_dict(), files.select(soup.ingredients_))
    assert findings.ok
    assert [name for name, state in findings.ingredients.items() if state == "unused"] == unused
    lost = soup.ingredients_[0]
    findings = soup.recipe_.verify(soup.state_dict(), files.drop(lost))
    assert not findings.ok
    assert "has that name or that content" in findings.ingredients[lost]
    assert len(findings.unchecked) == len(soup.recipe_.layers)
