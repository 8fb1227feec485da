"""Folders that transformers' Trainer, Lightning and Optuna wrote themselves."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection

from_path = CheckpointCollection.from_path


@pytest.mark.filterwarnings("default")  # theirs
def test_runs_of_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "start")
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": k % 2} for k in range(32)]
    best = {}
    for k, rate in enumerate((0.01, 0.1)):
        arguments = transformers.TrainingArguments(
            str(tmp_path / "sweep" / f"run-{k}"), num_train_epochs=2, learning_rate=rate, seed=k,
            per_device_train_batch_size=16, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "start")
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        best[f"run-{k}"] = -trainer.state.best_metric
        if k:
            trainer.save_model()
        # the weights that it calls best, in the end
        step = trainer.state.best_global_step
        found = from_path(tmp_path / "sweep" / f"run-{k}", which="best")
        assert found.names == (f"checkpoint-{step}",)
        assert torch.equal(
            found[f"checkpoint-{step}"]["classifier.weight"], model.classifier.weight.detach()
        )
    (tmp_path / "sweep").rename(tmp_path / "moved")
    found = from_path(tmp_path / "moved", scores="recorded")
    assert found.scores == pytest.approx(best)
    assert from_path(tmp_path / "moved" / "run-1").names == ("checkpoint-2", "checkpoint-4")
    assert type(found.build_module()) is type(model)


@pytest.mark.filterwarnings("default")  # theirs
def test_runs_of_trainer_with_any_network(tmp_path):
    """Which writes no config.json; the final model was taken for one more checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Network(nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": k % 2} for k in range(32)]
    finals, lasts = [], []
    for k in range(2):
        arguments = transformers.TrainingArguments(
            str(tmp_path / "sweep" / f"run-{k}"), num_train_epochs=3, learning_rate=3.0, seed=k,
            per_device_train_batch_size=16, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            Network(4, 2), arguments, train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        trainer.save_model()
        finals.append(trainer.state.best_global_step)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        lasts.append(-losses[-1])
    assert finals != [6, 6]  # the final model is not the last
    steps = tuple(f"checkpoint-{n}" for n in (2, 4, 6))
    open_sweep = partial(from_path, tmp_path / "sweep", module=partial(nn.Linear, 4, 2))
    assert from_path(tmp_path / "sweep" / "run-0").names == steps
    assert len(open_sweep(which="all")) == 6
    for which, names in (
        ("last", ["checkpoint-6"] * 2),
        ("best", [steps[n // 2 - 1] for n in finals]),
    ):
        found = open_sweep(which=which)
        assert [found.path(name).name for name in found] == names
    for state in (tmp_path / "sweep").rglob("trainer_state.json"):  # without a best one
        record = dict.fromkeys(("best_global_step", "best_metric", "best_model_checkpoint"))
        state.write_text(json.dumps({**json.loads(state.read_text()), **record}))
    found = open_sweep(which="last", scores="recorded")
    assert [found.path(name).name for name in found] == ["model.safetensors"] * 2
    assert [*found.scores.values()] == pytest.approx(lasts)


@pytest.mark.filterwarnings("default")  # theirs
def test_a_study_of_optuna_with_lightning(tmp_path, caplog):
    lightning = pytest.importorskip("lightning")
    optuna = pytest.importorskip("optuna")
    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.arange(32) % 2)
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    start = nn.Linear(4, 2).state_dict()

    class Classifier(lightning.LightningModule):
        def __init__(self, net, optimizer):  # as in the most used template
            super().__init__()
            self.save_hyperparameters(logger=False)
            self.model = net
            self.model.load_state_dict(start)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", self.training_step(batch, index))

        def configure_optimizers(self):
            return self.hparams.optimizer(self.parameters())

    best = {}

    def objective(trial):
        folder = tmp_path / "study" / f"trial_{trial.number}"
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            folder, monitor="val_loss", save_top_k=2, save_last=True
        )
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, callbacks=[keep],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        optimizer = partial(torch.optim.SGD, lr=trial.suggest_float("rate", 0.01, 5.0, log=True))
        trainer.fit(Classifier(nn.Linear(4, 2), optimizer), loader, loader)
        best[folder.name] = keep.best_model_path, keep.best_model_score.item()
        return best[folder.name][1]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    with caplog.at_level(logging.INFO, logger="sksoup"):
        found = from_path(tmp_path / "study", scores="recorded", module=lambda: nn.Linear(4, 2))
    assert found.names == ("trial_0", "trial_1", "trial_2")
    assert [str(found.path(name)) for name in found] == [path for path, _ in best.values()]
    assert list(found.scores.values()) == pytest.approx([-score for _, score in best.values()])
    assert all(path in caplog.text for path, _ in best.values())
    assert from_path(f"{tmp_path}/study/*/*.ckpt", which="best").names == found.names
    # in a folder of its own choice
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path / "logs",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(nn.Linear(4, 2), torch.optim.SGD), loader, loader)
    assert from_path(tmp_path / "logs").names == ("epoch=0-step=2",)
