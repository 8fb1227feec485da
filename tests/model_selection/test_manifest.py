"""Candidates on disk: the same search continues, another one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from skorch.callbacks import EpochScoring, LRScheduler

from sksoup import CheckpointError, GreedySoup
from sksoup.model_selection.manifest import make_manifest

from ..zoo import PlainNet, Zoo
from .searches import net_of, same_soup, search_of


def test_candidates_are_written_and_a_search_goes_on(tmp_path, zoo: Zoo):
    plain = search_of().fit(zoo.X, zoo.y)
    search = search_of(save_dir=tmp_path / "runs").fit(zoo.X, zoo.y)
    assert same_soup(search, plain)
    files = sorted((tmp_path / "runs").glob("*.safetensors"))
    assert search.checkpoints_.path("candidate003") == files[3]
    files[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    again = search_of(save_dir=tmp_path / "runs").fit(zoo.X, zoo.y)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # kept, not trained again
    assert same_soup(again, plain)
    assert again.best_score_ == search.best_score_


def test_without_a_seed_a_search_goes_on_with_the_seed_it_began_with(tmp_path, zoo: Zoo):
    first = search_of(save_dir=tmp_path, random_state=None).fit(zoo.X, zoo.y)
    again = search_of(save_dir=tmp_path, random_state=None).fit(zoo.X, zoo.y)
    assert again.cv_results_["params"] == first.cv_results_["params"]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"random_state": 1}, "seed"),
        ({"n_iter": 3}, "candidates"),
        ({"net": net_of(max_epochs=3)}, "params"),
        ({"net": net_of(PlainNet())}, "start"),
        ({"scoring": "neg_log_loss"}, "scoring"),
    ],
)
def test_another_search_is_refused(tmp_path, zoo: Zoo, changed, what):
    search_of(save_dir=tmp_path).fit(zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match=f"holds another search: .*{what}"):
        search_of(save_dir=tmp_path, **changed).fit(zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match="data differ"):
        search_of(save_dir=tmp_path).fit(zoo.X + 1, zoo.y)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"criterion__weight": torch.tensor([1.0, 2.0, 50.0])}),
        ({"criterion__weight": torch.ones(3)}, {"criterion__weight": torch.ones(3) * 2}),
        ({"optimizer__betas": (0.9, 0.99)}, {"optimizer__betas": (0.1, 0.2)}),
        ({"callbacks": [("s", LRScheduler("StepLR", step_size=1, gamma=1.0))]},
         {"callbacks": [("s", LRScheduler("StepLR", step_size=1, gamma=0.0))]}),
        ({"callbacks": [("s", EpochScoring(lambda net, X, y: 0.5))]},
         {"callbacks": [("s", EpochScoring(lambda net, X, y: 0.6))]}),
    ],
    ids=["added", "tensor", "tuple", "object", "function"],
)  # fmt: skip
def test_parameters_that_are_no_plain_values_are_compared(tmp_path, zoo: Zoo, one, other):
    """Once, the candidates of the other search were taken."""
    nets = [net_of(optimizer=torch.optim.Adam, **given) for given in (one, other)]
    search_of(nets[0], n_iter=1, save_dir=tmp_path).fit(zoo.X, zoo.y)
    search_of(nets[0], n_iter=1, save_dir=tmp_path).fit(zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match="holds another search: params differ"):
        search_of(nets[1], n_iter=1, save_dir=tmp_path).fit(zoo.X, zoo.y)


def test_another_order_of_the_labels_is_another_search(tmp_path, zoo: Zoo):
    """Candidates are trained on the positions of labels in `classes=`."""
    names = np.array(["a", "b", "c"])
    settings = {"save_dir": tmp_path, "n_iter": 2}
    search_of(**settings).fit(zoo.X, names[zoo.y])
    search_of(**settings, soup=GreedySoup(classes=["a", "b", "c"])).fit(zoo.X, names[zoo.y])
    with pytest.raises(CheckpointError, match="holds another search: data differ"):
        search_of(**settings, soup=GreedySoup(classes=["c", "b", "a"])).fit(zoo.X, names[zoo.y])


def test_checkpoints_of_unknown_origin_are_refused(tmp_path, zoo: Zoo):
    zoo.checkpoints.save(tmp_path)
    with pytest.raises(CheckpointError, match="unknown origin"):
        search_of(save_dir=tmp_path).fit(zoo.X, zoo.y)


def test_a_killed_search_continues(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        import numpy as np, torch
        from skorch import NeuralNetClassifier
        from sksoup.model_selection import SoupSearchCV

        class Kill:
            seen = 0
            def __call__(self, net, X, y):
                Kill.seen += 1
                if Kill.seen == 3 and sys.argv[2] == "kill":
                    os._exit(9)
                return 0.5

        rng = np.random.default_rng(0)
        X = rng.normal(size=(60, 4)).astype(np.float32)
        y = (X[:, 0] > 0).astype(int)
        torch.manual_seed(0)
        net = NeuralNetClassifier(torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss,
                                  verbose=0, train_split=None, max_epochs=2)
        search = SoupSearchCV(net, {"lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, n_iter=5, random_state=0,
                              scoring=Kill(), save_dir=sys.argv[1])
        search.fit(X, y)
        print(Kill.seen, search.soup_.state_dict()["bias"].tolist())
        """
    )

    def run(folder, mode):
        return subprocess.run(
            [sys.executable, "-c", script, str(folder), mode],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run(tmp_path / "a", "kill").returncode == 9
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 2
    resumed, whole = run(tmp_path / "a", "go"), run(tmp_path / "b", "go")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    n_trained, weights = resumed.stdout.split(" ", 1)
    assert (n_trained, weights) == ("3", whole.stdout.split(" ", 1)[1])


def test_parameters_that_are_objects_are_known_again_by_another_process(tmp_path):
    code = """
        import sys, torch, numpy as np
        from skorch import NeuralNetClassifier
        from skorch.callbacks import EpochScoring, Freezer, LRScheduler
        from skorch.helper import predefined_split
        from torch import nn
        from torch.utils.data import TensorDataset
        from sksoup.model_selection import SoupSearchCV
        torch.manual_seed(0)
        rows = TensorDataset(torch.ones(3, 4), torch.ones(3).long())
        net = NeuralNetClassifier(nn.Linear(4, 2), criterion=nn.CrossEntropyLoss, verbose=0,
                                  max_epochs=1, train_split=predefined_split(rows),
                                  criterion__weight=torch.ones(2), optimizer=torch.optim.Adam,
                                  optimizer__betas=(0.9, 0.99),
                                  callbacks=[("n", EpochScoring(lambda net, X, y: 1.0)),
                                             ("f", Freezer({"a", "b", "c"}))])
        X = np.random.RandomState(0).normal(size=(40, 4)).astype(np.float32)
        choices = {"callbacks": [[("lr", LRScheduler(step_every="batch"))], []]}
        search = SoupSearchCV(net, choices, n_iter=2, random_state=0, save_dir=sys.argv[1])
        search.fit(X, np.arange(40) % 2)
    """
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], check=True, env=env)


def test_a_folder_of_an_older_version_is_refused(tmp_path, zoo: Zoo):
    search_of(n_iter=1, save_dir=tmp_path).fit(zoo.X, zoo.y)
    manifest = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(CheckpointError, match="holds another search: version differ"):
        search_of(n_iter=1, save_dir=tmp_path).fit(zoo.X, zoo.y)


def data_of(*parts):
    return make_manifest(net_of(), None, 0, [], None, parts)["data"]


def test_data_are_compared_by_value():
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])
    given = data_of({"a": x, "b": -x}, y)
    assert given == data_of({"b": -x, "a": x.copy(order="F")}, y.copy())
    others = [
        ({"a": x, "b": x}, y),
        ({"a": x, "c": -x}, y),
        ({"a": -x, "b": x}, y),
        ({"a": x, "b": -x}, y[::-1]),
        ({"a": x.astype(np.float32), "b": -x}, y),
        ({"a": x.reshape(2, 3), "b": -x}, y),
        ((x, -x), y),
    ]
    assert len({given, *(data_of(*other) for other in others)}) == len(others) + 1


def test_labels_that_are_objects_are_compared_by_value_too():
    name = "ant"
    shared = np.array([name, name, "bee"], dtype=object)
    copied = np.array([name, "".join(["a", "nt"]), "bee"], dtype=object)
    assert data_of(shared) == data_of(copied)
    assert data_of(shared) != data_of(shared[::-1])
