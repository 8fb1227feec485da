"""The program on the documentation's page about language models as it stands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sksoup.__main__ import main

from .pages import run
from .small_bert import texts

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")


def save_start(folder: Path, lines: list[str]) -> None:
    """A small GPT-2 with a tokenizer of the words of these texts, and random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for line in lines for word in line.split()})
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<unk>", "Return", "the", *words])}
    vocabulary = {word: k for k, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(vocabulary), n_positions=48, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip


@pytest.mark.filterwarnings("default")  # of transformers
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [text for text in texts().text if len(text.split()) > 4]
    save_start(tmp_path / "start", lines)
    given = {"train_texts": lines[::2], "val_texts": lines[1::4], "test_texts": lines[3::4]}
    found = run("language", **given)
    soup, ckpts = found["soup"], found["ckpts"]
    assert ckpts.names == ("run-0", "run-1", "run-2")
    assert soup.score(found["X_val"]) >= max(
        -1e-6 + found["greedy"].individual_scores_[name] for name in ckpts
    )
    vocabulary = len(json.loads(Path("soup/tokenizer.json").read_text())["model"]["vocab"])
    assert soup.score(found["X_test"]) > -math.log(vocabulary)  # it has learned something
    assert found["write"].model.config.model_type == "gpt2"
    by_match, X = found["by_match"], found["X"]
    assert set(by_match.individual_scores_) == set(ckpts)
    scores = by_match.individual_scores_.values()
    assert found["exact_match"](by_match, X, X["input_ids"]) >= max(scores)
    assert main(["verify", "soup", "sweep"]) == 0
