"""The program on the documentation's page about LoRA adapters, and the plan that it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from benchmarks.adapters import counted, plan
from sksoup import CheckpointCollection
from sksoup.__main__ import main

from .pages import DOCS, run
from .small_bert import save_pretrained, texts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("default")  # of transformers
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = texts()
    save_pretrained(frame, tmp_path / "start")
    tokenizer = transformers.AutoTokenizer.from_pretrained("start")
    tokens = dict(tokenizer(list(frame.text), padding=True, return_tensors="pt"))
    labels = torch.tensor(frame.label.tolist())
    train, rest = train_test_split(np.arange(len(frame)), test_size=0.5, random_state=0)
    parts = {"train": train, "val": rest[::2], "test": rest[1::2]}
    given = {}
    for name, places in parts.items():
        given[f"X_{name}"] = {n: x[places] for n, x in tokens.items()}
        given[f"y_{name}"] = labels[places]
    found = run("lora", **given)
    soup, ckpts, X = found["soup"], found["ckpts"], given["X_test"]
    assert ckpts.names == ("run-0", "run-1", "run-2", "run-3")
    assert len(ckpts.on_one_base()) == 4
    with torch.no_grad():
        logits = soup.module_.eval()(**X).logits
        torch.testing.assert_close(found["model"](**X).logits, logits, atol=1e-5, rtol=1e-5)
        whole = transformers.AutoModelForSequenceClassification.from_pretrained("soup-model")
        torch.testing.assert_close(whole.eval()(**X).logits, logits, atol=0, rtol=0)
    assert set(found["errors"].values()) == {0.0}
    assert 0 < max(found["smaller"].values()) < 1
    # what the page says of ways to name the base, and of the command line
    by_name = CheckpointCollection.from_path("adapters")  # they name "start"
    by_path = CheckpointCollection.from_path("adapters", module="start")
    in_memory = CheckpointCollection.from_path("adapters", module=found["build_base"]())
    for other in (by_name, by_path, in_memory):
        for name in ckpts:
            theirs, ours = other[name], ckpts[name]
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[n], ours[n]) for n in ours)
    assert main(["average", "adapters", "-o", "average.safetensors", "--base", "start"]) == 0
    assert main(["verify", "average.safetensors", "adapters", "--base", "start"]) == 0
    assert main(["verify", "soup-model", "adapters"]) == 0


def test_the_plan_on_the_page_is_what_the_benchmark_counts():
    counted = "\n".join(plan(32, 4096, 11_008, 32_000, 16, 72)) + "\n"
    assert (DOCS / "lora_plan.txt").read_text() == counted


@pytest.mark.filterwarnings("default")  # of transformers
def test_the_plan_counts_what_is_there(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        vocab_size=128, tie_word_embeddings=False,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=linear))
    collection = CheckpointCollection([model] * 5)
    adapters = collection.on_one_base()
    assert counted(2, 64, 96, 128, 3, 5) == {
        "targeted": sum(collection.layout[n].size for n in adapters["checkpoint0"].ranks),
        "all": sum(info.size for info in collection.layout.values()),
        "factors": sum(one.n_numbers for one in adapters.values()),
    }
