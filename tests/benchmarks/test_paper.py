"""The experiments of the papers: their scripts run, and their page is what they measured."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import zoo
from benchmarks.networks import SmallResNet
from benchmarks.paper import clip_imagenet as clip
from benchmarks.paper import common, families, page

ROOT = Path(__file__).parents[2]


def test_the_clip_experiment_runs_from_files_to_soups(tmp_path):
    argv = ["--try", str(tmp_path), "--small", "--max-epochs", "1", "--batch-size", "16",
            "--device", "cpu"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise teaches nothing
        found = clip.main(argv)
        again = clip.main([*argv, "--systems", "MEHL-Soup+"])  # replayed from its memory
    assert list(found) == list(clip.PAPER)
    assert again["MEHL-Soup+"]["test"] == found["MEHL-Soup+"]["test"]
    assert again["MEHL-Soup+"]["passes"] < 0.1 < found["MEHL-Soup+"]["passes"]
    soup = load_file(tmp_path / "out" / "MEHL-Soup+.safetensors")
    assert set(soup) == set(clip.ClipClassifier(**clip.SMALL).state_dict())
    assert (tmp_path / "out" / "Greedy-Soup.html").exists()


def test_the_clip_tower_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = clip.ClipClassifier(**clip.SMALL).eval()
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
        image_size=32, patch_size=16, projection_dim=16, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    visual = ours.model.visual.state_dict()
    state = {}
    for name in theirs.state_dict():
        if name == "visual_projection.weight":
            state[name] = visual["proj"].T
            continue
        theirs_name = name.removeprefix("vision_model.")
        for pattern, other in (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"),
            ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
            ("self_attn", "attn"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
        ):  # fmt: skip
            theirs_name = theirs_name.replace(pattern, other)
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if part in theirs_name:
                whole = theirs_name.replace(f"{part}.", "in_proj_")
                state[name] = visual[whole].chunk(3)[index]
        state.setdefault(name, visual.get(theirs_name))
    theirs.load_state_dict(state)
    images = torch.randn(3, 3, 32, 32)
    expected = theirs(pixel_values=images).image_embeds
    torch.testing.assert_close(ours.model.visual(images), expected)


def test_images_are_cut_from_their_middle(tmp_path):
    from PIL import Image

    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # what the middle square holds
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = clip.decode(tmp_path / "wide.png", 20)
    assert found.shape == (3, 20, 20)
    assert found[:, :, 2:18].min() == 255
    assert clip.decode(tmp_path / "wide.png", 64).shape == (3, 64, 64)  # enlarged


def test_the_published_held_out_rows_are_those_flagged(tmp_path):
    np.save(tmp_path / "idxs.npy", np.array([0, 1, 0, 1.0]))
    assert clip.held_out_rows(np.zeros(4), tmp_path / "idxs.npy").tolist() == [1, 3]
    with pytest.raises(SystemExit, match=r"is for 4 images, found 5"):
        clip.held_out_rows(np.zeros(5), tmp_path / "idxs.npy")


def test_experiments_share_zoos_and_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    made = []
    for name, shared in (("own", None), ("common", 7)):
        make = lambda folder, n, seed, name=name: made.append((name, seed))  # noqa: E731
        monkeypatch.setitem(zoo.KINDS, name, zoo.Kind("", 2, make, shared))
    measure = lambda zoo, seed: {"seed": seed}  # noqa: E731
    experiments = [
        common.Experiment("first", measure, ["common", "own"], [1, 2], {"also": "said"}),
        common.Experiment("second", measure, ["own"], [2]),
    ]
    options = argparse.Namespace(folder=tmp_path / "zoos", out=tmp_path / "out", jobs=1)
    common.run(experiments, options)
    assert made[:3] == [("common", 7), ("own", 1), ("own", 2)]  # each once, before the rest
    assert len(made) == 3 + 4 + 1
    first, second = (
        json.loads((options.out / f"{name}.json").read_text()) for name in ("first", "second")
    )
    assert first["results"] == {name: [{"seed": 1}, {"seed": 2}] for name in ("common", "own")}
    assert first["also"] == "said"
    assert first["command"] == "python -m benchmarks paper.first"
    assert second["results"] == {"own": [{"seed": 2}]}
    some = common.Experiment("first", lambda zoo, seed: {"anew": seed}, ["own"], [1, 2])
    (options.folder / "measured" / "first" / "own-1.json").unlink()
    common.run([some], options)  # of one zoo: what is known of the others stays
    kept = json.loads((options.out / "first.json").read_text())["results"]
    assert kept == first["results"] | {"own": [{"anew": 1}, {"seed": 2}]}
    common.run([common.Experiment("first", measure, ["own"], [2])], options)
    other_seeds = json.loads((options.out / "first.json").read_text())["results"]
    assert other_seeds == {"own": [{"seed": 2}]}
    del made[:]
    (options.folder / "measured" / "first" / "own-2.json").unlink()
    common.run(experiments, options)
    assert made == [("own", 2)]


def test_the_page_is_made_from_the_results(tmp_path):
    text = page.Page(common.RESULTS).text()
    assert text == (ROOT / "docs" / "paper.rst").read_text(encoding="utf-8")
    assert "@" not in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.Page(common.RESULTS).readme() == readme
    statements = (ROOT / "docs" / page.STATEMENTS).read_text(encoding="utf-8")
    assert page.Page(common.RESULTS).statements() == statements


def test_the_figure_of_the_readme_shows_the_results(tmp_path):
    some = page.Page(common.RESULTS).families
    numbers = families.described(some)
    assert numbers in (ROOT / "docs" / "images" / "hero.svg").read_text(encoding="utf-8")
    assert len({family.title for family in some}) == len(some)
    families.draw(some, tmp_path / "hero.svg")
    assert numbers in (tmp_path / "hero.svg").read_text(encoding="utf-8")


def test_the_sizes_of_the_families_in_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = page.Page(common.RESULTS).found
    experiments = ("tables_1_2", "shift", "adapters", "language")
    runs = [zoo.KINDS[kind].n for name in experiments for kind in found[name]["results"]]
    assert f"fine-tuned {min(runs)} to {max(runs)} times" in readme
    said = re.findall(r"([\d.,]+)( million)? parameters", page.Page(common.RESULTS).text())
    sizes = [float(n.replace(",", "")) * (1e6 if million else 1) for n, million in said]
    assert (min(sizes), max(sizes)) == (57_000, 22e6)
    assert "one network of 57,000 to 22 million parameters" in readme
    assert round(sum(p.numel() for p in SmallResNet().parameters()), -3) == min(sizes)


def test_verdicts_and_statements():
    assert families.verdict([2.0, 2.1, 1.9]) == "✓ +2.00 ± 0.25"
    assert families.verdict([2.0, 2.1, 1.9], least=3.0) == "✗ +2.00 ± 0.25"
    assert families.verdict([2.0, 2.1, 1.9], least=2.1) == "inconclusive (+2.00 ± 0.25)"
    one, other = ({families.BEST: 80.0, families.DEFAULT: 81.0 + x} for x in (0.0, 0.04))
    nets = families.Family("Net", [one, other])
    words = families.Family(
        "Words", [{families.BEST: 100.0, families.DEFAULT: 90.0}] * 2, is_perplexity=True
    )
    level = families.Family("Level", [{families.BEST: 80.0, families.DEFAULT: 80.0}] * 2)
    diverged = families.Family("Diverged", [{families.BEST: 80.0}] * 2)
    some = [nets, words, level, diverged]
    said = families.statement(some, families.DEFAULT, families.BEST, "the best checkpoint")
    assert said == (
        "`MEHLSoup(layerwise=True)` is better than the best checkpoint in 2 of 3 families of "
        "models (Net +1.0 ± 0.3; Words 10.0 ± 0.0 % lower perplexity), worse in none, and "
        "inconclusive in 1."
    )
    assert families.worst_seed(some, families.DEFAULT) == "+0.0 points (Level)"
    (row,) = (
        line for line in families.readme_table(some).splitlines() if "best checkpoint" in line
    )
    assert row == (
        "| `MEHLSoup(layerwise=True)` | the best checkpoint | 2: Net +1.0 ± 0.3; Words 10.0 ± 0.0 "
        "% lower perplexity | none | 1 |"
    )


@pytest.mark.parametrize("shift", [None, {"vit": [], "photos": [], "new": []}])
def test_families_do_not_depend_on_which_experiments_were_run(shift):
    found = {"tables_1_2": page.Page(common.RESULTS).found["tables_1_2"]}
    if shift:
        found["shift"] = {"results": shift}
    titles = [family.title for family in families.families(found)]
    more = ["EfficientNet, photos", "new"] if shift else []
    assert titles == ["ConvNet", "ViT", "ResNet", "Text encoder", *more]


def test_every_result_names_its_command_and_seeds():
    for path in common.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert path.stem in found["command"]
        assert (common.RESULTS.parent / f"{path.stem}.py").exists()
        few = list(zoo.SEEDS[:3])  # of the experiments that take longest
        seeds = {"defaults": list(zoo.DEVELOPMENT_SEEDS), "shift": few, "amounts": few}
        seeds["shift_memory"] = few[:1]
        assert found["seeds"] == seeds.get(path.stem, list(zoo.SEEDS))
    assert len(zoo.SEEDS) >= 5
    assert not set(zoo.SEEDS) & set(zoo.DEVELOPMENT_SEEDS)
