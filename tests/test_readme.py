"""What README says: its code runs and prints what it shows, and its numbers are measured ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import common, families, page
from sksoup import CheckpointCollection, Recipe, __version__
from sksoup.datasets import load_digits_checkpoints

from .zoo import Net, Zoo

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
TEN_LINES, OWN = (code for language, code in BLOCKS if language == "python")
(PRINTED,) = (text for language, text in BLOCKS if not language and "%" in text)
# what ATen may compute with: the figures must not depend on the processor
CAPABILITIES = ["default", *(["avx2"] if "AVX" in torch.backends.cpu.get_cpu_capability() else [])]


def percents(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_ten_lines_print_what_is_shown_on_every_processor(capability, tmp_path):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", TEN_LINES], cwd=tmp_path, env=environment, check=True, text=True,
        capture_output=True,
    ).stdout  # fmt: skip
    assert re.sub(r"[\d.]+%", "", printed) == re.sub(r"[\d.]+%", "", PRINTED)
    assert percents(printed) == pytest.approx(percents(PRINTED), abs=0.1 + 1e-9)
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    soup = CheckpointCollection([tmp_path / "soup.safetensors"])["soup"]
    weights = recipe.cook(load_digits_checkpoints().checkpoints)
    assert all(torch.equal(weights[name], soup[name]) for name in weights)


def test_your_own_checkpoints(zoo: Zoo, tmp_path, monkeypatch):
    zoo.checkpoints.save(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    rows = {"X_val": zoo.X, "y_val": zoo.y, "X_test": zoo.X[:20], "y_test": zoo.y[:20]}
    found = {"MyNet": Net, **rows}
    exec(compile(OWN, "README.md", "exec"), found)
    assert isinstance(found["soup"].module_, torch.nn.Module)
    assert found["ckpts"].names == zoo.checkpoints.names


def test_every_number_is_known():
    """Outside of what ``python -m benchmarks paper.page`` writes, which has a test of its own."""
    before, rest = TEXT.split(page.BEGIN)
    text = before + rest.split(page.END)[1]
    text = re.sub(r"https?://\S+|arXiv:\S+", "", text.replace(PRINTED, ""))
    zoo, python = load_digits_checkpoints(), r'requires-python = ">=(3\.\d+)"'
    few = page.Page(common.RESULTS).found["few_rows"]["results"].values()
    known = {
        re.search(python, (ROOT / "pyproject.toml").read_text())[1],
        str(len(zoo.checkpoints)),
        str(min(int(n) for seeds in few for n in seeds[0])),  # validation examples
        "95",  # intervals, as in common.mean_and_interval
        "0", "1", "3", "4",  # seeds, 1 model, b + 3 models, a model batch
    }  # fmt: skip
    assert set(re.findall(r"(?<![\w.-])\d[\d.,]*\d|(?<![\w.-])\d", text)) - known == {"2026"}
    assert f"of {len(zoo.y_test):,} test examples" in PRINTED


def test_in_how_many_families_it_is_better():
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    found = families.compared(page.Page(common.RESULTS).families, families.DEFAULT, families.BEST)
    better, worse, n = len(found[True]), len(found[False]), sum(map(len, found.values()))
    counts = f"{words[better]} of {words[n]} families of models, and worse in {words[worse]}."
    assert f"better than the best checkpoint in {counts}" in " ".join(TEXT.split())


def test_with_the_least_number_of_examples_a_soup_is_not_below_the_best_checkpoint():
    for seeds in page.Page(common.RESULTS).found["few_rows"]["results"].values():
        gains = page.paired([seed["50"] for seed in seeds], "Centered-Soup+", "Best checkpoint")
        assert np.mean(gains) > 0


def test_it_is_short_and_its_links_lead_somewhere():
    assert TEXT.count("\n") <= 120
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_citation_and_the_changelog_name_this_version():
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in text
    released = re.search(r"\ndate-released: (\S+)\n", text)[1]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## [{__version__}] - {released}\n" in changes
