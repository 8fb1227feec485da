"""The model card: what was mixed, whatever the checkpoints are called."""

from __future__ import annotations

import dataclasses
import re

from sksoup import CheckpointCollection, GreedySoup, Recipe

from ..zoo import PaperLearned, Zoo, make_states


def test_the_card_tells_what_was_mixed(files, zoo: Zoo, tmp_path):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors", card=True)
    card = (tmp_path / "soup.md").read_text()
    assert card.startswith("---\ntags:\n- model-soup\n")
    for name in files:
        assert (f"| {name} |" in card) == (name in soup.ingredients_)
        assert (files.sha256(name) in card) == (name in soup.ingredients_)
    soup.save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.md").exists()


def test_names_can_not_break_out_of_the_card():
    states = make_states(2, seed=0)
    bad = "a|b`<script>alert(1)</script>\n---\n# [x](javascript:y)"
    files = CheckpointCollection(states, names=[bad, "c"])
    recipe = Recipe.record("by hand", files, [0.5, 0.5], layers=dict.fromkeys(states[0], 0))
    card = recipe.to_card()
    assert "<script>" not in card
    assert "\n---\n#" not in card.split("---", 2)[2]
    (row,) = [line for line in card.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells
    assert re.search(r"(?<!\\)[`\[]", row.split("| `")[0]) is None


def test_the_learned_temperature_is_in_the_card(zoo: Zoo):
    soup = PaperLearned(random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert f"Multiply the logits by {soup.temperature_:.6g}" in soup.recipe_.to_card()
    recalibrated = dataclasses.replace(soup.recipe_, recalibrated=("a", "b"))
    assert "2 tensors were re-estimated from data" in recalibrated.to_card()
