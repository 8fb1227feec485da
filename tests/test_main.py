"""The command line: what it prints, writes, refuses, and its exit status."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, MEHLSoup, Recipe, mix
from sksoup.__main__ import main

from .checkpoints.runs import write_lightning
from .zoo import Net, Zoo, make_states, same_tensors


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for k, state in enumerate(make_states(4, seed=0)):
        save_file(state, folder / f"ft{k}.safetensors")
    return folder


@pytest.fixture
def soup(zoo: Zoo, runs, tmp_path):
    collection = CheckpointCollection.from_path(runs, module=Net)
    soup = MEHLSoup(layerwise=True, model_batch_size=2, max_epochs=1, random_state=0)
    soup.fit(collection, zoo.X, zoo.y).save(tmp_path / "soup.safetensors")
    return tmp_path / "soup.safetensors"


def run(*arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status


def test_inspect(runs, capsys):
    run("inspect", runs)
    assert "good to mix" in capsys.readouterr().out
    run("inspect", runs, "--json")
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["checkpoints"]] == ["ft0", "ft1", "ft2", "ft3"]
    for k in range(3):
        torch.manual_seed(k)
        state = torch.nn.Linear(40, 40).state_dict()
        save_file(state, runs.parent / f"alien{k}.safetensors")
    run("inspect", runs.parent / "alien*", status=1)
    assert "will not work" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["mean.safetensors", "mean"])
def test_average(runs, tmp_path, capsys, out):
    run("average", runs, "-o", tmp_path / out, "--json")
    assert json.loads(capsys.readouterr().out)["ingredients"] == 4
    collection = CheckpointCollection.from_path(runs)
    written = CheckpointCollection([tmp_path / out])["mean"]
    expected = mix(collection, [0.25] * 4)
    assert same_tensors(written, {n: expected[n] for n in written})
    run("verify", tmp_path / out, runs)
    assert "Verified: 9 of 9 tensors" in capsys.readouterr().out


def test_cook_and_verify_a_soup(runs, soup, tmp_path, capsys):
    run("verify", soup, runs)
    run("cook", soup, runs, "-o", tmp_path / "again.safetensors")
    assert "again.safetensors: 4 checkpoints mixed" in capsys.readouterr().out
    assert same_tensors(load_file(tmp_path / "again.safetensors"), load_file(soup))
    Recipe.load(soup).save(tmp_path / "recipe.json")
    run("cook", tmp_path / "recipe.json", runs, "-o", tmp_path / "sharded")
    run("verify", tmp_path / "sharded", runs)


def test_verify_finds_what_was_changed(runs, soup, tmp_path, capsys):
    state = load_file(soup)
    state["head.bias"][0] += 1e-6
    forged = tmp_path / "forged.safetensors"
    Recipe.load(soup).save_weights(forged, state)
    run("verify", forged, runs, status=1)
    printed = capsys.readouterr().out
    assert "NOT verified: 8 of 9" in printed
    assert "differs: 'head.bias' has other values" in printed
    state = load_file(runs / "ft1.safetensors")
    state["head.bias"][0] += 1e-6
    save_file(state, runs / "ft1.safetensors")
    run("verify", soup, runs, "--json", status=1)
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert "is not the one that the recipe was made of" in document["ingredients"]["ft1"]
    assert document["ingredients"]["ft0"] == "ok"
    assert len(document["unchecked"]) == 9
    run("cook", soup, runs, "-o", tmp_path / "no.safetensors", status=2)
    assert "is not the one that the recipe was made of" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


def test_existing_files_are_kept_unless_forced(runs, tmp_path, capsys):
    out = tmp_path / "mean.safetensors"
    out.write_text("precious")
    run("average", runs, "-o", out, status=2)
    assert "exists. Give another name, or --force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    run("average", runs, "-o", out, "--force")
    assert load_file(out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    run("average", runs, "-o", tmp_path / "full", "--force", status=2)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "no/such"], "No checkpoints found at 'no/such'"),
        (["average", "RUNS", "-o", "x.pt"], "got the suffix '.pt', expected .safetensors"),
        (["average", "RUNS", "-o", "no/such/x.safetensors"], "'no/such' does not exist"),
        (
            ["average", "RUNS", "-o", "x.SAFETENSORS"],
            "got the suffix '.SAFETENSORS', expected .saf",
        ),
        (["cook", "no.json", "RUNS", "-o", "x.safetensors"], "'no.json' can't be read"),
        (["verify", "RUNS/ft0.safetensors", "RUNS"], "holds weights but no sksoup recipe"),
    ],
)
def test_bad_input_is_said_in_words_and_in_json(runs, capsys, arguments, said):
    arguments = [a.replace("RUNS", str(runs)) for a in arguments]
    run(*arguments, status=2)
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    run(*arguments, "--json", status=2)
    assert said in json.loads(capsys.readouterr().out)["error"]


def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(runs, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK)
    run("average", str(runs), "-o", str(runs / "soup.safetensors"), status=2)
    assert "is read-only, or not yours to write to" in capsys.readouterr().err


def test_usage(capsys):
    for arguments in ([], ["nope"], ["average", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "exit status" in capsys.readouterr().out


def test_a_file_with_the_name_of_an_option_is_none(runs, tmp_path, monkeypatch, capsys):
    """As a shell gives it for `*` in a folder of others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "--module=evil:net.pt").touch()
    given = ["--module=evil:net.pt", "--data", "x.csv", "--label", "y", "-o", "out"]
    with pytest.raises(SystemExit) as stopped:
        main(["greedy", str(runs), *given])
    assert stopped.value.code == 2
    assert "'--module=evil:net.pt' is a file in this folder" in capsys.readouterr().err
    (tmp_path / "-m").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "-m" / "a.safetensors")
    assert main(["inspect", "--", "-m"]) == 0


COMMAND = [sys.executable, "-m", "sksoup"]


def test_progress_is_for_terminals_only(runs, tmp_path):
    quiet = subprocess.run([*COMMAND, "inspect", runs], capture_output=True, text=True, check=True)
    assert quiet.stderr == ""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run([*COMMAND, "inspect", runs], stdout=subprocess.PIPE, stderr=terminal, check=True)
    assert select.select([master], [], [], 5)[0], "nothing was shown"
    shown = os.read(master, 10_000).decode()
    assert "B/s" in shown or "B [" in shown


def test_a_kill_while_averaging_leaves_the_old_file(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "mean.safetensors"
    runs.mkdir()
    for k in range(6):
        save_file({f"t{i}": torch.full((500_000,), float(k)) for i in range(10)},
                  runs / f"{k}.safetensors")  # fmt: skip
    save_file({"w": torch.ones(1)}, out)
    before = out.read_bytes()
    process = subprocess.Popen([*COMMAND, "average", runs, "-o", out, "--force"])
    while process.poll() is None and not list(tmp_path.glob(".mean.*")):
        time.sleep(0.001)  # until it has begun to write
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:  # it was done before the signal came
        assert load_file(out).keys() == {f"t{i}" for i in range(10)}
    else:
        assert out.read_bytes() == before or load_file(out)["t0"][0] == 2.5


def test_several_paths(runs, tmp_path, capsys):
    paths = [runs / f"ft{k}.safetensors" for k in (0, 1, 3)]
    run("average", *paths, "-o", tmp_path / "three.safetensors")
    assert "3 checkpoints mixed" in capsys.readouterr().out
    expected = mix(CheckpointCollection(paths), np.full(3, 1 / 3))
    found = load_file(tmp_path / "three.safetensors")
    assert same_tensors(dict(sorted(found.items())), dict(sorted(expected.items())))
    run("verify", tmp_path / "three.safetensors", runs / "ft[01]*", paths[2])
    run("average", paths[0], "-o", tmp_path / "one.safetensors")
    assert "1 checkpoint mixed" in capsys.readouterr().out


def test_prefix(tmp_path, capsys):
    states = make_states(2, seed=0)
    for k, state in enumerate(states):
        saved = {f"model.{name}": value for name, value in state.items()}
        save_file(saved, tmp_path / f"ft{k}.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    run("average", tmp_path, "-o", out / "as_saved.safetensors")
    said = capsys.readouterr().out
    assert "all names begin with 'model.', as in the files: --prefix model. drops it" in said
    run("average", tmp_path, "-o", out / "plain.safetensors", "--prefix", "model.")
    assert "begin" not in capsys.readouterr().out
    run("verify", out / "plain.safetensors", tmp_path / "ft*")  # with the prefix of the recipe
    Net().load_state_dict(load_file(out / "plain.safetensors"))
    run("verify", out / "plain.safetensors", tmp_path, "--prefix", "model.")


def test_the_key_of_the_recipe_is_taken(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for k, state in enumerate(make_states(2, seed=0)):
        torch.save({"model": make_states(1, seed=k)[0], "ema": state}, runs / f"{k}.pt")
    mean = tmp_path / "mean.safetensors"
    run("average", runs, "-o", mean, "--key", "ema")
    run("verify", mean, runs)
    run("cook", mean, runs, "-o", tmp_path / "again.safetensors")
    assert same_tensors(load_file(tmp_path / "again.safetensors"), load_file(mean))


def test_the_output_is_no_input(runs, capsys):
    run("average", runs, "-o", runs / "soup.safetensors")
    run("average", runs, "-o", runs / "soup.safetensors", "--force", status=2)
    assert "is one of the checkpoints to be mixed" in capsys.readouterr().err
    run("average", runs / "ft*", "-o", runs / "soup.safetensors", "--force")
    run(
        "cook", runs / "soup.safetensors", runs, "-o", runs / "ft0.safetensors", "--force", status=2
    )
    assert "is one of the checkpoints to be mixed" in capsys.readouterr().err
    run("cook", runs / "soup.safetensors", runs, "-o", runs / "soup.safetensors", "--force")
    renamed = runs / "renamed.safetensors"  # found by its content
    (runs / "ft0.safetensors").rename(renamed)
    run("cook", runs / "soup.safetensors", runs, "-o", renamed, "--force", status=2)
    assert "is one of the checkpoints to be mixed" in capsys.readouterr().err


def test_the_output_is_no_shard_of_an_input(runs, tmp_path, capsys):
    for name in ("a", "b"):
        mix([runs / "ft0.safetensors", runs / "ft1.safetensors"], [0.5, 0.5],
            out=tmp_path / name, shard_size="1KB")  # fmt: skip
    indices = [tmp_path / name / "model.safetensors.index.json" for name in ("a", "b")]
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[0]
    before = shard.read_bytes()
    run("average", *indices, "-o", shard, "--force", status=2)
    assert "is one of the checkpoints to be mixed, or part of one" in capsys.readouterr().err
    assert shard.read_bytes() == before


def test_paths_that_overlap_count_a_file_once(runs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("average", runs, runs / "ft1*", runs / ".." / "runs" / "ft0.safetensors", "-o", out)
    assert "4 checkpoints mixed" in capsys.readouterr().out


def test_the_names_of_a_cooked_soup_are_told_not_those_of_the_files(zoo: Zoo, tmp_path, capsys):
    runs = tmp_path / "runs"
    runs.mkdir()
    for k, state in enumerate(make_states(2, seed=0)):
        saved = {f"model.{name}": value for name, value in state.items()}
        save_file(saved, runs / f"ft{k}.safetensors")
    soup = MEHLSoup(max_epochs=1, random_state=0)
    soup.fit(CheckpointCollection.from_path(runs, module=Net), zoo.X, zoo.y)
    soup.save(tmp_path / "soup.safetensors")
    run("cook", tmp_path / "soup.safetensors", runs, "-o", tmp_path / "again.safetensors")
    assert "begin" not in capsys.readouterr().out


def test_the_names_of_a_network_of_transformers_are_its_own(tmp_path, capsys):
    """Those of a Llama without its head all begin with 'model.'."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    for k in range(2):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "runs" / f"ft{k}")
    run("average", tmp_path / "runs", "-o", tmp_path / "out")
    assert "begin" not in capsys.readouterr().out


def test_names_of_folders_may_have_dots(runs, tmp_path):
    run("average", runs, "-o", tmp_path / "Llama-3.1-8B-soup")
    assert (tmp_path / "Llama-3.1-8B-soup" / "model.safetensors.index.json").exists()


def test_what_is_wrong_is_said_and_no_traceback(runs, soup, tmp_path, capsys):
    run("cook", runs, soup, "-o", tmp_path / "x.safetensors", status=2)
    assert "The recipe is the first argument." in capsys.readouterr().err
    torch.save({"w": torch.ones(1)}, tmp_path / "raw.ckpt")
    run("verify", tmp_path / "raw.ckpt", runs, status=2)
    assert "has no sksoup recipe" in capsys.readouterr().err
    recipe = json.loads(Recipe.load(soup).to_json())
    recipe["coef"] = recipe["coef"][0]
    (tmp_path / "edited.json").write_text(json.dumps(recipe))
    run(
        "cook", tmp_path / "edited.json", runs, "-o", tmp_path / "x.safetensors", "--json", status=2
    )
    assert "not a complete sksoup recipe" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("out", ["x.safetensors", "x"])
def test_a_full_disk_is_said_with_what_to_do(runs, tmp_path, out):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200));"
        "from sksoup.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "average", runs, "-o", tmp_path / out, "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Free some disk space" in json.loads(done.stdout)["error"]
    assert not list(tmp_path.glob("*x*"))


def test_a_reader_that_ends_early_is_no_error(runs, monkeypatch):
    """As in: sksoup inspect runs | head -1."""
    for arguments in (["inspect", str(runs)], ["inspect", str(runs), "--json"]):
        ours, theirs = os.pipe()
        os.close(ours)
        with os.fdopen(theirs, "w") as closed:
            monkeypatch.setattr(sys, "stdout", closed)
            assert main(arguments) == 0
            print("more")  # as Python flushes at its end


def test_sweeps(tmp_path, capsys):
    for k in range(3):
        write_lightning(tmp_path / "study" / f"trial_{k}", [0.5, 0.25, 0.75])
    run("inspect", tmp_path / "study", "--json")
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["checkpoints"]] == ["trial_0", "trial_1", "trial_2"]
    run("average", tmp_path / "study", "-o", tmp_path / "best.safetensors")
    run("average", tmp_path / "study", "--which", "last", "-o", tmp_path / "last.safetensors")
    best, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    assert torch.equal(best["w"] + 1, last["w"])  # of the epochs 1 and 2
    run("cook", tmp_path / "best.safetensors", tmp_path / "study", "-o", tmp_path / "c.safetensors")
    capsys.readouterr()
    run("inspect", tmp_path / "styde", status=2)
    assert "a similar name there is 'study'" in capsys.readouterr().err


def test_what_would_ruin_an_average_is_warned_of_and_can_be_left_out(runs, tmp_path, capsys):
    for k in range(4):
        base = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
        save_file({"w": base + 0.01 * k}, runs / f"ft{k}.safetensors")
    torch.manual_seed(3)
    save_file({"w": torch.randn(40, 40)}, runs / "alien.safetensors")
    run("average", runs, "-o", tmp_path / "mean.safetensors")
    said = capsys.readouterr().err
    assert "warning: 'alien' was not fine-tuned from the same weights" in said
    assert "--healthy leaves it out. See `sksoup inspect`." in said
    assert "collection" not in said
    run("average", runs, "-o", tmp_path / "good.safetensors", "--healthy")
    printed = capsys.readouterr()
    assert "warning: Left out 1 of 5 checkpoints: 'alien'" in printed.err
    assert "4 checkpoints mixed" in printed.out
    save_file({"w": torch.full((40, 40), torch.nan)}, runs / "alien.safetensors")
    run("average", runs, "-o", tmp_path / "no.safetensors", status=2)
    assert "--healthy leaves out all such checkpoints." in capsys.readouterr().err
    run("average", runs, "-o", tmp_path / "finite.safetensors", "--healthy")


@pytest.mark.parametrize("name", ["mean.safetensors", "mean"])
def test_a_soup_among_its_ingredients_is_named(runs, capsys, name):
    run("average", runs, "-o", runs / name)
    assert "sksoup wrote" not in capsys.readouterr().err
    run("inspect", runs)
    assert "'mean' is a soup that sksoup wrote" in capsys.readouterr().out
    run("average", runs, "-o", runs.parent / "again.safetensors")
    assert "warning: 'mean' is a soup that sksoup wrote" in capsys.readouterr().err
    run("verify", runs / name, runs)  # where it is no ingredient
    assert capsys.readouterr().err == ""
