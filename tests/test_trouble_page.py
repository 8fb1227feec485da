"""Each message on the documentation's page "When something goes wrong" is one that is given."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sksoup import (
    CheckpointCollection,
    GreedySoup,
    MEHLSoup,
    Recipe,
    UniformSoup,
)
from sksoup.engine.deltas import ModelBatch

from .pages import read
from .zoo import Net, Zoo, around, make_states

# what gives the messages, in the order of the page
GIVEN: list[Callable[[Zoo, pytest.MonkeyPatch], object]] = []


def given(trigger: Callable[[Zoo, pytest.MonkeyPatch], object]) -> None:
    GIVEN.append(trigger)


def runs(n: int = 8) -> CheckpointCollection:
    """Files ``runs/ft00.pt``, ... in the folder that the test runs in."""
    Path("runs").mkdir()
    for k, state in enumerate(make_states(n, 0)):
        torch.save(state, f"runs/ft{k:02d}.pt")
    return CheckpointCollection.from_path("runs", module=Net)


def replaced(name: str, state: object) -> CheckpointCollection:
    """The same, with something else in one file."""
    runs()
    torch.save(state, f"runs/{name}.pt")
    return CheckpointCollection.from_path("runs", module=Net)


@given
def nothing_there(zoo, monkeypatch):
    Path("sweep").mkdir()
    CheckpointCollection.from_path("sweep")


@given
def another_architecture(zoo, monkeypatch):
    replaced("ft07", {**make_states(1, 0)[0], "head.weight": torch.zeros(10, 6)})


@given
def an_adapter(zoo, monkeypatch):
    Path("runs/ft07").mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/encoder"}
    Path("runs/ft07/adapter_config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(2)}, "runs/ft07/adapter_model.safetensors")
    CheckpointCollection.from_path("runs")


@given
def a_damaged_file(zoo, monkeypatch):
    runs(7).save("copies")
    whole = Path("copies/ft00.safetensors").read_bytes()
    Path("runs/ft07.safetensors").write_bytes(whole[: len(whole) // 2])
    CheckpointCollection.from_path("runs")


@given
def a_whole_module(zoo, monkeypatch):
    replaced("ft07", Net())


@given
def a_changed_file(zoo, monkeypatch):
    ckpts = runs()
    torch.save(make_states(1, 1)[0], "runs/ft07.pt")
    ckpts["ft07"]


@given
def not_finite(zoo, monkeypatch):
    state = make_states(1, 0)[0]
    state["head.weight"][0, 0] = torch.nan
    UniformSoup().fit(replaced("ft07", state), zoo.X, zoo.y)


@given
def no_module(zoo, monkeypatch):
    runs()
    UniformSoup().fit(CheckpointCollection.from_path("runs"), zoo.X, zoo.y)


@given
def another_module(zoo, monkeypatch):
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.head = self.head, nn.Identity()

    runs()
    UniformSoup().fit(CheckpointCollection.from_path("runs", module=Other), zoo.X, zoo.y)


@given
def checkpoints_for_rows(zoo, monkeypatch):
    runs()
    UniformSoup().fit(["runs/ft00.pt", "runs/ft01.pt"], [0, 1])


TOKENS = {"input_ids": [[2, 5, 3], [2, 6, 3]], "attention_mask": [[1, 1, 1], [1, 1, 1]]}


@given
def tokens_without_labels(zoo, monkeypatch):
    UniformSoup().fit(zoo.checkpoints, {name: torch.tensor(part) for name, part in TOKENS.items()})


@given
def tokens_of_several_lengths(zoo, monkeypatch):
    UniformSoup().fit(zoo.checkpoints, {"input_ids": [[2, 5, 3], [2, 3]]}, [0, 1])


@given
def labels_that_lack_one(zoo, monkeypatch):
    UniformSoup().fit(zoo.checkpoints, zoo.X[:2], ["bad", "good"])


@given
def labels_in_another_order(zoo, monkeypatch):
    nets = CheckpointCollection({"ft00": nn.Linear(3, 3), "ft01": nn.Linear(3, 3)})
    for weights in nets.held_tensors():
        weights.copy_(torch.eye(3) if weights.ndim > 1 else torch.zeros(3))
    y = torch.arange(120) % 3  # the outputs are the inputs
    GreedySoup(classes=[1, 2, 0]).fit(nets, torch.eye(3)[y], y)


@given
def a_network_that_ends_in_a_sigmoid(zoo, monkeypatch):
    net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    UniformSoup().fit(CheckpointCollection(around(net, 2)), zoo.X, zoo.y > 0)


@given
def another_start(zoo, monkeypatch):
    def build():
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    nets = [*around(build(), 7), build()]
    ckpts = CheckpointCollection(nets, names=[f"ft{k:02d}" for k in range(8)])
    MEHLSoup(max_epochs=1, random_state=0).fit(ckpts, zoo.X, zoo.y)


@given
def greedy_takes_one(zoo, monkeypatch):
    GreedySoup(min_improvement=0.5).fit(runs(), zoo.X, zoo.y)


@given
def a_search_in_vain(zoo, monkeypatch):
    MEHLSoup(lr=1.0, max_epochs=3, random_state=0).fit(runs(), zoo.X, zoo.y)


@given
def a_search_that_diverges(zoo, monkeypatch):
    MEHLSoup(lr=1.0, max_epochs=3, criterion=lambda z, y: (1e38 * z).square().sum()).fit(
        runs(), zoo.X, zoo.y
    )


@given
def memory_that_runs_out(zoo, monkeypatch):
    combine = ModelBatch.combine

    def limited(self, coef):
        if self.capacity > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return combine(self, coef)

    monkeypatch.setattr(ModelBatch, "combine", limited)
    MEHLSoup(max_epochs=1, model_batch_size=None).fit(runs(), zoo.X, zoo.y)


@given
def a_recipe_that_was_edited(zoo, monkeypatch):
    UniformSoup().fit(runs(), zoo.X, zoo.y).recipe_.save("recipe.json")
    document = json.loads(Path("recipe.json").read_text())
    document["method"] = "GreedySoup"
    Path("recipe.json").write_text(json.dumps(document))
    Recipe.load("recipe.json")


@given
def a_soup_that_differs(zoo, monkeypatch):
    UniformSoup().fit(ckpts := runs(), zoo.X, zoo.y).save("soup.safetensors")
    recipe = Recipe.load("soup.safetensors")
    weights = recipe.cook(ckpts)
    weights["head.bias"] += 1
    return str(recipe.verify(weights, ckpts))


def given_by(trigger, zoo, monkeypatch, folder: Path) -> list[str]:
    """What is printed: errors, warnings, or what is returned, with paths as they were given."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = [trigger(zoo, monkeypatch)]
        except Exception as error:
            said = [f"{type(error).__name__}: {error}"]
    said += [f"{one.category.__name__}: {one.message}" for one in caught]
    return [" ".join(text.replace(f"{folder}/", "").split()) for text in said if text]


def quoted() -> list[str]:
    """The messages that the page shows."""
    blocks = re.findall(r"\.\. code-block:: text\n\n((?:    .*\n)+)", read("trouble"))
    return [" ".join(block.split()) for block in blocks]


def test_there_are_as_many_on_the_page():
    assert len(GIVEN) == len(quoted()) == 22  # two of them are explained together


@pytest.mark.parametrize("trigger", GIVEN, ids=lambda trigger: trigger.__name__)
def test_a_message_is_on_the_page(trigger, zoo: Zoo, tmp_path, monkeypatch):
    said = given_by(trigger, zoo, monkeypatch, tmp_path / "here")[0]
    text = quoted()[GIVEN.index(trigger)]
    pattern = ".*".join(map(re.escape, text.split("...")))
    assert re.fullmatch(pattern, said), f"the page shows {text!r}, given was {said!r}"
