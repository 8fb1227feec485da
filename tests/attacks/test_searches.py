"""A folder of a search that others write to: what is no record of it is refused by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from sksoup import CheckpointError
from sksoup.checkpoints.write import write_safetensors
from sksoup.model_selection import manifest
from sksoup.model_selection.fine_tuning import RECORD, fine_tune
from sksoup.model_selection.manifest import MANIFEST, claim, recorded_seed


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"seed": [1]}',
        b'{"seed": -1}',
        b'{"seed": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: str(text[:12]),
)
def test_a_record_of_no_search_is_named(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text)
    for read in (recorded_seed, lambda folder: claim(folder, {"seed": 1})):
        with pytest.raises(
            CheckpointError, match=r"search\.json' (is not the manifest|can't be read)"
        ):
            read(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == text


def test_a_pipe_is_no_record(tmp_path):
    os.mkfifo(tmp_path / MANIFEST)
    script = "from sksoup.model_selection.manifest import *; claim(Path('.'), {'seed': 1})"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "search.json' can't be used: it is a pipe" in ran.stderr


@pytest.mark.parametrize(
    "record",
    [None, "x", "[]", "{}", "[" * 100_000, '{"score": "a", "fit_time": 1}',
     '{"score": NaN, "fit_time": 1}', '{"score": 1%s, "fit_time": 1}' % ("0" * 400)],
    ids=lambda text: str(text)[:16],
)  # fmt: skip
def test_a_file_that_is_no_candidate_is_named(tmp_path, record):
    path = tmp_path / "candidate000.safetensors"
    write_safetensors(path, {"w": torch.ones(1)}, {} if record is None else {RECORD: record})
    with pytest.raises(CheckpointError, match=r"candidate000\.safetensors' is not a candidate"):
        fine_tune(None, {}, 0, None, [], None, None, path)
    record = json.dumps({"score": 0.5, "fit_time": 1.0})
    write_safetensors(path, {"w": torch.ones(1)}, {RECORD: record})
    assert fine_tune(None, {}, 0, None, [], None, None, path).score == 0.5


def test_of_searches_that_begin_at_once_one_has_the_folder(tmp_path, monkeypatch):
    read = manifest._recorded

    def slow(folder):
        found = read(folder)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(manifest, "_recorded", slow)
    refused = []

    def begin(seed):
        try:
            claim(tmp_path / "search", {"seed": seed})
        except CheckpointError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert all("holds another search: seed differ" in said for said in refused)
