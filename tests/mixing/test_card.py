"""The model card: what was mixed, whatever the checkpoints are called."""

from __future__ import annotations

import dataclasses
import re

import pytest
from safetensors.torch import save_file

from sksoup import CheckpointCollection, GreedySoup, MEHLSoup, Recipe, RecipeError, UniformSoup

from ..zoo import Net, PaperLearned, Zoo, make_states
from .test_origins import BERT, CARD, write


def test_the_card_tells_what_was_mixed(files, zoo: Zoo, tmp_path):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors", card=True)
    card = (tmp_path / "soup.md").read_text()
    assert card.startswith('---\ntags: ["model-soup", "merge", "sksoup"]\n---\n')
    assert "load_file(" in card
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


def test_the_card_of_a_hugging_face_folder(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    states = make_states(2, seed=0)
    for k, state in enumerate(states):
        write(tmp_path / f"run{k}", BERT, CARD)
        save_file(state, tmp_path / f"run{k}" / "model.safetensors")
    files = CheckpointCollection.from_path(tmp_path, module=Net)
    recipe = Recipe.record("by hand", files, [0.5, 0.5], layers=dict.fromkeys(states[0], 0))
    card = hub.ModelCard(recipe.to_card(files))
    assert card.data.to_dict() == {
        "base_model": "org/start", "library_name": "transformers", "license": "apache-2.0",
        "pipeline_tag": "text-classification", "tags": ["model-soup", "merge", "sksoup"],
    }  # fmt: skip
    assert "Labels: `good`, `bad`." in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert "model = BertForSequenceClassification.from_pretrained(" in code
    # a collection with other names says nothing
    renamed = CheckpointCollection(states)
    assert "base_model" not in hub.ModelCard(recipe.to_card(renamed)).data.to_dict()


@pytest.mark.parametrize(
    "bad", ["x\nlicense: gpl\n---\n", "---", "a: [b", "\u2028---\u2028", "'\"`|"]
)
def test_no_name_gets_into_the_front_matter(tmp_path, bad):
    hub = pytest.importorskip("huggingface_hub")
    states = make_states(2, seed=0)
    config = {"architectures": [bad], "_name_or_path": bad, "id2label": {"0": bad, "1": bad}}
    for k, state in enumerate(states):
        write(tmp_path / f"run{k}", config, f"---\nlicense: {bad}\nbase_model: {bad}\n---\n")
        save_file(state, tmp_path / f"run{k}" / "model.safetensors")
    files = CheckpointCollection(
        [tmp_path / "run0", tmp_path / "run1"], module=Net, names=[bad, f"{bad}2"]
    )
    recipe = Recipe.record(bad, files, [0.5, 0.5], layers=dict.fromkeys(states[0], 0))
    data = hub.ModelCard(recipe.to_card(files)).data.to_dict()
    assert {k: v for k, v in data.items() if k not in ("license", "base_model")} == {
        "library_name": "transformers", "tags": ["model-soup", "merge", "sksoup"],
    }  # fmt: skip
    assert data.get("license") in (None, "x")  # which that card says
    assert data.get("base_model") in (None, "x")


def test_the_held_out_score_and_its_number_of_rows(zoo: Zoo):
    soup = MEHLSoup(max_epochs=1, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.recipe_.held_out == (max(soup.held_out_scores_.values()), len(zoo.y))
    score, n = soup.recipe_.held_out
    assert f"It scores {score:.4f} on {n:,} held-out rows." in soup.recipe_.to_card()
    assert Recipe.from_json(soup.recipe_.to_json()) == soup.recipe_
    uniform = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert uniform.recipe_.held_out is None
    assert "held-out rows" not in uniform.recipe_.to_card()
    greedy = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    if len(greedy.ingredients_) > 1:
        kept = [step["score"] for step in greedy.path_ if step["kept"]]
        assert greedy.recipe_.held_out == (kept[-1], len(zoo.y))


@pytest.mark.parametrize("held_out", [[0.5], [0.5, 0], [0.5, 1.5], ["x", 3], 7, [float("inf"), 3]])
def test_a_held_out_score_that_is_none(zoo: Zoo, held_out):
    recipe = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y).recipe_
    with pytest.raises(RecipeError, match="The recipe can't be written"):
        dataclasses.replace(recipe, held_out=held_out).to_json()
