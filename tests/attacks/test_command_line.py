"""Tables and names that the command line takes long for."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import Recipe
from sksoup.__main__ import main
from sksoup.cli.search import _ranked_first
from sksoup.cli.wording import in_commands

from ..zoo import Net


def test_a_column_of_many_texts_as_labels_is_refused_at_once(tmp_path, capsys):
    """Each was once compared with all others."""
    for k in range(2):
        torch.manual_seed(k)
        save_file(Net().state_dict(), tmp_path / f"{k}.safetensors")
    rows = "".join(f"1,2,3,4,text {k % 50_000}\n" for k in range(110_000))
    (tmp_path / "rows.csv").write_text("a,b,c,d,label\n" + rows)
    begin = time.perf_counter()
    data = ["--data", str(tmp_path / "rows.csv"), "--label", "label"]
    module = ["--module", f"{Net.__module__}:{Net.__qualname__}"]
    assert main(["greedy", str(tmp_path), *data, *module, "-o", str(tmp_path / "s")]) == 2
    assert "got 50000 distinct labels" in capsys.readouterr().err
    assert time.perf_counter() - begin < 10


def build():
    return torch.nn.Linear(2, 1)


@pytest.mark.filterwarnings("ignore:R.2 score is not well-defined")
def test_a_score_that_is_not_defined_is_null_in_json(tmp_path, capsys):
    """R² of a single row: once, after the soup was written, an error."""
    for k in range(2):
        torch.manual_seed(k)
        torch.save(build().state_dict(), tmp_path / f"{k}.pt")
    rows = "".join(f"{k},{k * k % 7},{k * 0.3}\n" for k in range(30))
    (tmp_path / "val.csv").write_text("a,b,y\n" + rows)
    (tmp_path / "test.csv").write_text("a,b,y\n1,2,0.5\n")
    data = ["--data", str(tmp_path / "val.csv"), "--test", str(tmp_path / "test.csv")]
    options = ["--label", "y", "--task", "regression", "--module", f"{__name__}:build", "--json"]
    assert main(["greedy", str(tmp_path), *data, *options, "-o", str(tmp_path / "out")]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (shown["scores"]["test"], shown["best_checkpoint"]["test"]) == (None, None)


def test_messages_with_very_long_names_are_shown_at_once():
    name = "leave it out with collection.drop(' , or pass forward=" * 20_000
    begin = time.perf_counter()
    assert in_commands(f"{name!r} differs.") == f"{name!r} differs."
    assert time.perf_counter() - begin < 10
    short = "It differs. Leave it out with collection.drop('ft3') or collection.healthy()."
    assert in_commands(short) == "It differs. --healthy leaves it out."


@pytest.mark.parametrize("odd", ["[" * 5000 + "]" * 5000, "9" * 5000])
def test_configs_that_python_can_not_parse_are_named(tmp_path, capsys, odd):
    for k in range(2):
        net = Net()
        (tmp_path / "runs" / f"run{k}").mkdir(parents=True)
        save_file(net.state_dict(), tmp_path / "runs" / f"run{k}" / "model.safetensors")
        (tmp_path / "runs" / f"run{k}" / "config.json").write_text(f'{{"a": {odd}}}')
    np.savez(tmp_path / "val.npz", X=np.zeros((4, 6), np.float32), y=np.arange(4) % 2)
    line = f"greedy {tmp_path}/runs --module tests.zoo:Net --data {tmp_path}/val.npz"
    assert main([*line.split(), "-o", f"{tmp_path}/soup"]) == 2
    assert "config.json' can't be read" in capsys.readouterr().err


def test_a_start_is_a_path_also_if_a_checkpoint_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, name in enumerate(("base", "runs/base", "runs/a")):
        (tmp_path / name).mkdir(parents=True)
        state = {"w": torch.tensor([[float(value), 1.0]])}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    assert main(["stock", "runs", "--start", "base", "-o", "soup.safetensors"]) == 0
    used = Recipe.load("soup.safetensors").ingredients
    assert [one.name for one in used] == ["a", "base", "start"]


def test_labels_of_test_data_are_texts_where_those_of_the_validation_data_are(tmp_path, capsys):
    torch.manual_seed(0)
    net = Net()
    (tmp_path / "runs").mkdir()
    for k in range(2):
        save_file(net.state_dict(), tmp_path / "runs" / f"{k}.safetensors")
    X = torch.randn(90, 4)
    labels = np.array(["1", "2", "unknown"])[np.arange(90) % 3]
    rows = [",".join([*map(str, x), label]) for x, label in zip(X.tolist(), labels, strict=True)]
    known = [row for row in rows[45:] if not row.endswith("unknown")]
    for name, part in (("val", rows[:45]), ("test", known)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,b,c,d,y", *part]))
    line = f"greedy {tmp_path}/runs --module tests.zoo:Net --data {tmp_path}/val.csv --label y"
    line += f" --test {tmp_path}/test.csv -o {tmp_path}/soup.safetensors --json"
    assert main(line.split()) == 0
    assert len(known) == 30
    assert json.loads(capsys.readouterr().out)["ingredients"]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_classes_count_for_labels_of_any_shape(tmp_path, capsys, shape):
    torch.manual_seed(0)
    nets = [torch.nn.Linear(2, 3) for _ in range(2)]
    with torch.no_grad():
        for net in nets:
            net.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
            net.bias.zero_()
    (tmp_path / "runs").mkdir()
    for k, net in enumerate(nets):
        save_file(net.state_dict(), tmp_path / "runs" / f"{k}.safetensors")
    X = np.array([[2, 0], [0, 2], [-2, -2]] * 4, np.float32)
    np.savez(tmp_path / "val.npz", X=X, y=np.array([2, 0, 1] * 4).reshape(shape))
    line = f"greedy {tmp_path}/runs --module {__name__}:linear --data {tmp_path}/val.npz"
    line += f" --classes 2 0 1 -o {tmp_path}/soup.safetensors --json"
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["validation"] == 1.0


def linear() -> torch.nn.Module:
    return torch.nn.Linear(2, 3)


@pytest.mark.parametrize("rows", [None, 10])
def test_only_the_best_checkpoint_is_called_so(tmp_path, rows):
    soup = SimpleNamespace(
        held_out_scores_={"best": 0.5}, ranking_rows=rows, checkpoints_=SimpleNamespace(scores=None)
    )
    assert _ranked_first(soup, SimpleNamespace(n=20)) == (0.5, rows is None)
    assert _ranked_first(soup, SimpleNamespace(n=10)) == (0.5, True)
