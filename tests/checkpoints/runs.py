"""Folders as Trainer and Lightning leave them; tests/test_sweeps_real.py has their own."""

from __future__ import annotations

import json
from collections import OrderedDict

import torch
from safetensors.torch import save_file

STATE = {"w": torch.arange(6.0).reshape(2, 3)}
TOLD = {"step", "epoch"}


def write_folder(folder, value=0.0):
    """A Hugging Face folder; ``value`` tells whose weights it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": STATE["w"] + value}, folder / "model.safetensors")
    return folder


def write_trainer(run, log, best=None, metric="eval_loss", final=False, elsewhere="/gpu/7/out"):
    """A run: ``log`` is step -> metrics; ``best`` a step, in a folder of another machine."""
    history = []
    for step, metrics in log.items():
        folder = write_folder(run / f"checkpoint-{step}", step)
        history.append({"loss": 0.7, "step": step, "epoch": 1.0, "learning_rate": 1e-3})
        history.append({**metrics, "eval_runtime": 0.1, "step": step, "epoch": 1.0})
        known = best if best is not None and best <= step else None
        state = {
            "global_step": step, "log_history": history, "best_global_step": known,
            "best_metric": log[known][metric] if known else None,
            "best_model_checkpoint": f"{elsewhere}/checkpoint-{known}" if known else None,
        }  # fmt: skip
        (folder / "trainer_state.json").write_text(json.dumps(state))
        (folder / "optimizer.pt").write_bytes(b"not weights")
    if final:
        write_folder(run, 0.5)
    return run


def write_lightning(folder, scores, monitor="val_loss", mode="min", last=True, foreign=None):
    """The files of ModelCheckpoint(save_top_k=-1, save_last=last): one for each score."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, torch.Tensor] = {}
    pick = min if mode == "min" else max
    for epoch, score in enumerate(scores):
        name = f"epoch={epoch}-step={2 * epoch + 2}.ckpt"
        kept[f"/elsewhere/{name}"] = torch.tensor(score)
        best = pick(kept, key=lambda path: kept[path].item())
        key = (
            f"ModelCheckpoint{{'monitor': {monitor!r}, 'mode': {mode!r}, 'every_n_train_steps': 0, "
            f"'every_n_epochs': 1, 'train_time_interval': None}}"
        )
        state = {
            "monitor": monitor, "best_model_score": kept[best], "best_model_path": best,
            "current_score": torch.tensor(score), "dirpath": "/elsewhere",
            "best_k_models": dict(kept), "kth_value": torch.tensor(score),
            "last_model_path": "/elsewhere/last.ckpt",
        }  # fmt: skip
        container = {
            "epoch": epoch, "global_step": 2 * epoch + 2, "pytorch-lightning_version": "2.6.6",
            "state_dict": OrderedDict(w=STATE["w"] + epoch), "callbacks": {key: state},
            "optimizer_states": [{"state": {}}], "hyper_parameters": foreign or {"lr": 0.1},
        }  # fmt: skip
        torch.save(container, folder / name)
    if last:
        torch.save(container, folder / "last.ckpt")
    return folder
