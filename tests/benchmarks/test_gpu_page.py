"""``make gpu`` without a GPU, and its page."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu


def test_the_page_is_that_of_the_results():
    assert gpu.PAGE.read_text(encoding="utf-8") == gpu.page(gpu.RESULTS)


def test_the_whole_run_smaller_on_a_processor(tmp_path):
    arguments = (
        f"--device cpu --kind vit --checkpoints 3 --model-batch 2 --rows 32 "
        f"--output {tmp_path} --page {tmp_path / 'gpu.rst'} --only"
    ).split()
    gpu.main([*arguments, "MEHL-Soup+ bf16"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["results"]) == ["MEHL-Soup+ bf16 deltas"]
    assert found["options"]["precision"] == "bf16"
    text = (tmp_path / "gpu.rst").read_text()
    assert "K = 3, b = 2, 32 rows in minibatches of 128, 2 epochs, vit, bf16." in text
    assert "    MEHL-Soup+ bf16 deltas " in text
    assert "not run yet" not in text


def test_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device: run this on a machine"):
        gpu.main([])
