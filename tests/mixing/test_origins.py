"""What the folders of ingredients agree on, and what is no identifier of the hub."""

from __future__ import annotations

import json
import os
from unittest.mock import patch

import pytest

from sksoup.mixing import origins
from sksoup.mixing.origins import Origin, common_origin

CARD = """---
license: apache-2.0
base_model: org/start
tags:
- generated
---

# A run
"""


def write(folder, config=None, card=None):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


BERT = {
    "architectures": ["BertForSequenceClassification"], "_name_or_path": "google/bert",
    "id2label": {"0": "good", "1": "bad"},
}  # fmt: skip


def test_a_folder_of_many_ingredients_is_read_once(tmp_path, monkeypatch):
    folder, read = write(tmp_path / "a", BERT, CARD), []
    original = origins._origin
    monkeypatch.setattr(origins, "_origin", lambda one: read.append(one) or original(one))
    assert common_origin([folder] * 5).architecture == "BertForSequenceClassification"
    assert read == [folder]


def test_what_all_agree_on(tmp_path):
    a, b = (write(tmp_path / name, BERT, CARD) for name in "ab")
    agreed = Origin("org/start", "apache-2.0", "BertForSequenceClassification", ("good", "bad"))
    assert common_origin([a, b]) == agreed
    assert agreed.task == "text-classification"
    assert common_origin([a, None]) == common_origin([]) == Origin()
    other = write(tmp_path / "c", BERT | {"id2label": {}}, CARD.replace("apache-2.0", "mit"))
    assert common_origin([a, other]) == Origin("org/start", None, agreed.architecture)
    # without a card, older configs name the start
    assert common_origin([write(tmp_path / "d", BERT)]).base_model == "google/bert"


def test_the_card_of_a_run_is_that_of_its_checkpoints(tmp_path):
    write(tmp_path / "run", card=CARD)
    step = write(tmp_path / "run" / "checkpoint-5", BERT)
    assert common_origin([step]).licence == "apache-2.0"


@pytest.mark.parametrize(
    "name",
    [
        "/home/me/start", "./start", "../start", "runs/checkpoint-500", "a/b/c", "", 7, "x" * 200,
        "org/start\nlicense: mit", "org/st\u00e4rt", "-x/y", "there",
    ],
)  # fmt: skip
def test_what_is_no_model_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    folder = write(tmp_path / "a", {"_name_or_path": name})
    assert common_origin([folder]).base_model is None


@pytest.mark.parametrize(
    "front",
    [
        "license: other", "license: [mit]", "license: mit # or not", "license:", "License: mit",
        "x: |\n  license: mit", "license:\n- mit\n- gpl",
    ],
)  # fmt: skip
def test_licences_that_are_not_plain(tmp_path, front):
    folder = write(tmp_path / "a", {}, f"---\n{front}\n---\nlicense: mit\n")
    assert common_origin([folder]).licence is None


def test_files_that_can_not_be_used_say_nothing(tmp_path):
    for k, text in enumerate(
        ("[]", "{", "[" * 100_000, '{"architectures": [7], "id2label": {"5": 1}}')
    ):
        assert common_origin([write(tmp_path / str(k), text)]) == Origin()
    folder = tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(folder / "README.md")
    (folder / "config.json").write_bytes(b"\xff")
    assert common_origin([folder]) == Origin()


def test_the_card_of_a_run_is_read_once(tmp_path):
    folders = [write(tmp_path / f"checkpoint-{k}", {}) for k in range(5)]
    (tmp_path / "README.md").write_text(CARD)
    with patch.object(origins, "read_text", wraps=origins.read_text) as read:
        found = common_origin(folders)
    assert (found.licence, found.base_model) == ("apache-2.0", "org/start")
    names = [call.args[0].name for call in read.call_args_list]
    assert names.count("README.md") == 1
