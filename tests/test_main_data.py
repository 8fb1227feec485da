"""Commands that read data from files: what they find and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    MEHLSoup,
    Recipe,
    SoupWarning,
)
from sksoup.__main__ import _print, _shown_warnings, main
from sksoup.checkpoints.hub import offline
from sksoup.cli import tokenizer as tokenizer_module
from sksoup.cli.files import read_file
from sksoup.cli.tokenizer import find_tokenizer, load_tokenizer, set_padding, tokenize

from .command_zoo import make_folder, texts, write_csv
from .zoo import Net, same_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    make_folder(folder)
    (folder / "folder.safetensors").mkdir()
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    """Shared by the tests: they remove what they write."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return made


TEXTS = "greedy runs --text text --label label -o out --data"
NETS = "greedy nets --module model:build -o out.safetensors --data"
TABLE = f"{NETS} table.csv --label species"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("greedy nets --data val.npz -o out", "Give --module package.module:factory"),
        ("greedy nets --module model --data val.npz -o out", "names no factory: expected"),
        ("greedy nets --module model:no --data val.npz -o out", "'model' has no 'no'"),
        ("greedy nets --module model:NUMBER --data val.npz -o out", "is of type int, expected a"),
        ("greedy nets --module model:number --data val.npz -o out", "an object of type int"),
        ("greedy nets --module model:fails --data val.npz -o out", "RuntimeError: no such GPU"),
        ("greedy nets --module model:needs --data val.npz -o out", "needs the arguments width"),
        ("greedy nets --module no_model:x --data val.npz -o out", "can't be imported (from the"),
        (f"{NETS} val.npz --base base", "--module and --base can't be given together"),
        (f"{NETS} val.npz --device nowhere", "--device nowhere can't be used here"),
        (f"{NETS} val.npz --scoring f1_makro", "is no metric of scikit-learn: expected one of"),
        (f"{NETS} no.npz", "There is no file 'no.npz'"),
        (f"{NETS} model.py", "has the suffix '.py', expected .csv, .tsv, .npz"),
        (f"{NETS} val.npz --inputs x", "has no array 'x': expected one of 'X', 'y'"),
        (f"{NETS} val.npz --task regression", "y has 1 targets per row, expected 3"),
        (f"{NETS} table.csv", "which column of 'table.csv' holds the labels? It has 'a', 'b'"),
        (f"{NETS} table.csv --label specie", "no column 'specie': expected one of 'a', 'b', 'c', "
                                             "'d', 'species'. Did you mean 'species'?"),
        (f"{NETS} table.csv --label a", "line 2, column 'species': got 'cat', expected a finite"),
        (f"{TABLE} --label a", "--label was given 2 times, expected once for --task class"),
        (f"{TABLE} --classes cat dog", "'table.csv', line 4, column 'species': got the label "
                                       "'owl', expected one of 'cat', 'dog', as in --classes"),
        (f"{TABLE} --classes cat dog owl --task regression", "--classes is for --task class"),
        (f"{NETS} val.npz --classes cat dog owl", "expected integers, as the labels in the data"),
        (f"{TEXTS} val.csv --inputs text", "--text and --inputs can't be given together"),
        (f"{TEXTS} val.csv --tokenizer nets", "There is no tokenizer in 'nets'"),
        (f"{TEXTS} val.csv --task language-modeling", "needs one --text COLUMN and no --label"),
        ("average runs -o out --weights 0.5 0.5",
         "--weights has 2 numbers, expected 3. One number per checkpoint is needed, in this "
         "order: 'ft0', 'ft1', 'ft2'."),
        ("average runs -o out --weights 0.5 0.5 1",
         "whose sum is 2, expected 1. One number per checkpoint is needed, in this order: 'ft0', "
         "'ft1', 'ft2'. Divided by their sum: --weights 0.25 0.25 0.5"),
        ("average runs -o out --weights 1 -1e-05 -.5E+2 0", "--weights has 4 numbers, expected 3"),
        ("average runs -o out --weights 0.5 0.5 nan", "has NaN or infinite values, expected fin"),
        ("average runs -o out --shard-size big", "--shard-size='big' is not a size"),
        ("average nets -o out.safetensors --shard-size 1MB", "--shard-size is for a folder"),
        ("greedy no --data no.csv -o runs", "'runs' exists and is not an empty folder"),
        # before the data are read
        ("greedy nets --module model:build --data no.npz --force -o nets/ft0.safetensors",
         "is one of the checkpoints to be mixed"),
        ("greedy nets --module model:build --data no.npz --force -o folder.safetensors",
         "'folder.safetensors' is a folder. Give another name"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong_and_nothing_is_written(folder, capsys, line, said):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert main([*line.split(), "--json"]) == 2
    assert said in (error := json.loads(capsys.readouterr().out)["error"])
    assert "said" not in error
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert {p for p in after if "__pycache__" not in str(p)} == {
        p for p in before if "__pycache__" not in str(p)
    }
    assert all(after[path] == time for path, time in before.items() if path.is_file())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no examples"),
        (b"text,label\n", "has no examples"),
        (b"text,label\na,negative\n\n\nb,positiv\n",
         "'bad.csv', line 5, column 'label': got the label 'positiv', expected one of 'negative', "
         "'positive', as in 'runs/ft0/config.json'"),
        (b'text,label\n"a\nb",negative\n,positive\n',
         "'bad.csv', line 4, column 'text': got an empty cell, expected a text"),
        (b'text,label\n" \n",negative\nb,positive\n', "line 2, column 'text': got an empty cell"),
        (b"text,label\na,negative\nb,\n", "line 3, column 'label': got an empty cell"),
        (b"text,label\na,negative\nb,negative\n",
         "all 2 labels in 'label' are 'negative', expected two or more"),
        (b"text,label\na, b,negative\n", "line 2: got 3 cells, expected 2"),
        (b'text,label\n"a "b" c",negative\n', "line 2: ',' expected after '\"'"),
        (b'text,label\n"a,negative\n', "line 2: unexpected end of data"),
        (b"text,text\na,negative\n", "has the column 'text' more than once"),
        (b"text;label\na;negative\n", "separated by another character, give --delimiter"),
        (b"text,label\n\xe4,negative\n", "is not UTF-8: byte 11 is 0xe4"),
        (b"label\nnegative\npositive\n", "has no column 'text': expected one of 'label'"),
    ],
)  # fmt: skip
def test_tables_that_are_wrong(folder, capsys, content, said):
    Path("bad.csv").write_bytes(content)
    assert main([*TEXTS.split(), "bad.csv", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"].replace(f"{folder}{os.sep}", "")
    assert said in error
    assert not Path("out").exists()


@pytest.mark.parametrize("cell", ["", "abc", "nan", "inf", "1_000"])
def test_cells_that_are_no_finite_numbers(tmp_path, cell):
    write_csv(tmp_path / "a.csv", ("x", "y"), [(1, 2), (cell, 3)])
    with pytest.raises(ValueError, match=r"line 3, column 'x': got .*expected a finite number"):
        read_file(tmp_path / "a.csv").numbers("x")


def test_arrays_that_are_wrong(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return read_file(tmp_path / "a.npz")

    with pytest.raises(ValueError, match="arrays of objects, which would be unpickled"):
        saved(X=np.array([{}, 1], dtype=object))
    for y in (np.zeros(0), np.float64(1)):
        with pytest.raises(ValueError, match=r"'y' has shape \(0?,?\), expected a row for each"):
            saved(X=np.zeros((2, 2)), y=y).labels("y")
    bad = saved(X=np.array([[1.0, 2], [3, np.nan]]), y=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="row 1, array 'X': got NaN or an infinite value"):
        bad.numbers("X")
    with pytest.raises(ValueError, match=r"'X' has dtype float64 and shape .*expected texts"):
        bad.texts("X")
    assert bad.texts("y") == ["a", "b"]
    (tmp_path / "a.npz").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"can't be read: expected an \.npz file"):
        read_file(tmp_path / "a.npz")


def test_arrays_that_are_not_used_may_have_other_rows(folder, capsys):
    """As in files with the training and the test set, or a seed."""
    rows = dict(np.load("val.npz"))
    more = {"x_train": np.zeros((3, 2)), "seed": np.int64(3), "names": np.array(["a", "b"])}
    np.savez("more.npz", **more, X=rows["X"], y=rows["y"], short=rows["y"][:-1])
    line = f"{NETS} more.npz".replace("out.", "more.")
    assert main(line.split()) == 0
    assert main([*line.split(), "--label", "short", "--force"]) == 2
    assert "'more.npz': the arrays of the inputs and labels have the shapes" in (
        capsys.readouterr().err
    )


def _member(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def _flip(content: bytes) -> bytes:
    """Bits flipped in the compressed data."""
    return content[:60] + bytes(byte ^ 0x5A for byte in content[60:110]) + content[110:]


def test_archives_that_are_damaged(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 3))
    np.savez_compressed(tmp_path / "good.npz", X=X)
    good = (tmp_path / "good.npz").read_bytes()
    entry = good.index(b"PK\x01\x02")
    huge = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 3)}\n"
    stored = io.BytesIO()
    np.save(stored, X)
    contents = [
        _flip(good),
        good[: entry + 8] + b"\1\0\x63" + good[entry + 11 :],
        stored.getvalue(),
    ]
    for header in (huge, "{'shape': ((((\n", "\n"):
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as file:
            file.writestr("X.npy", _member(header))
        contents.append(zipped.getvalue())
    for content in contents:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.npz' can't be read: expected an \.npz file"):
            read_file(tmp_path / "bad.npz")
    with zipfile.ZipFile(tmp_path / "good.npz", "a") as file:
        file.writestr("README", "of the data")
    assert list(read_file(tmp_path / "good.npz").parts) == ["X"]


@pytest.mark.parametrize("dtype", ["S1", "c8", "V4", "M8[D]", [("a", "f8")]])
def test_arrays_that_are_no_numbers(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", X=np.zeros(4, dtype), text=np.array(["a"] * 4))
    file = read_file(tmp_path / "a.npz")
    for read in (file.numbers, file.labels, file.texts):
        with pytest.raises(ValueError, match=r"a\.npz': the array 'X' has dtype .*, expected"):
            read("X")
    with pytest.raises(ValueError, match="the array 'text' has dtype <U1, expected numbers"):
        file.numbers("text")


@pytest.mark.parametrize("delimiter", ["\t", r"\t"])
def test_a_tab_may_be_written_as_in_a_shell(tmp_path, delimiter):
    (tmp_path / "a.txt").write_text("x\ty\n1\t2\n")
    assert read_file(tmp_path / "a.txt", delimiter).parts == {"x": ["1"], "y": ["2"]}


@pytest.mark.parametrize("delimiter", ["", ";;", "\n", "tab"])
def test_a_delimiter_is_one_character(folder, capsys, delimiter):
    assert main([*TABLE.split(), "--delimiter", delimiter]) == 2
    assert f"--delimiter must be one character, or \\t for a tab, got {delimiter!r}" in (
        capsys.readouterr().err
    )


def test_tables_with_many_columns_and_long_texts(tmp_path):
    names = [f"gene{k}" for k in range(100_000)]
    write_csv(tmp_path / "wide.csv", tuple(names), [range(100_000)])
    begin = time.perf_counter()
    assert list(read_file(tmp_path / "wide.csv").parts) == names
    assert time.perf_counter() - begin < 20  # more than a minute if it grows with their square
    text = "a soup " * 100_000
    write_csv(tmp_path / "long.csv", ("text",), [(text,)])
    before = csv.field_size_limit()
    assert read_file(tmp_path / "long.csv").texts("text") == [text]
    assert csv.field_size_limit() == before


def test_a_test_label_that_validation_data_has_not(folder, capsys):
    write_csv(folder / "other.csv", ("a", "b", "c", "d", "species"), [(1, 2, 3, 4, "cow")])
    assert main([*TABLE.split(), "--test", "other.csv"]) == 2
    said = capsys.readouterr().err
    assert (
        "'other.csv', line 2, column 'species': got the label 'cow', expected one of 'cat'" in said
    )
    assert "as in the validation data 'table.csv'" in said


def test_pairs_of_texts(folder, capsys):
    ones, others = ([text for text, _ in texts(30, seed)] for seed in (1, 2))
    labels = [label for _, label in texts(30, seed=1)]
    write_csv(
        folder / "pairs.csv", ("one", "other", "label"), zip(ones, others, labels, strict=True)
    )
    line = "mehl runs --data pairs.csv --label label --text one --text other --seed 0 --epochs 2"
    assert main([*line.split(), "-o", "pairs.safetensors"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("runs/ft0")
    pairs = dict(tokenizer(ones, others, padding=True, return_tensors="np"))
    assert pairs["token_type_ids"].any()
    runs = CheckpointCollection.from_path("runs")
    soup = MEHLSoup(max_epochs=2, random_state=0).fit(runs, pairs, labels)
    assert np.array_equal(Recipe.load("pairs.safetensors").coef, soup.recipe_.coef)
    line = f"{TEXTS} pairs.csv --text one --text other"
    assert main(line.split()) == 2
    assert "--text was given 3 times, expected once, or twice for pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("tokenizer.json", {"pre_tokenizer": {
          "type": "Split", "pattern": {"Regex": "(o+)+(x|p+)+$"}, "behavior": "Isolated",
          "invert": False}}, "can't tokenize the texts: PanicException"),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
         "can't be loaded by transformers"),
        ("config.json", {"vocab_size": 9}, "is of another model: the texts have the token"),
        ("tokenizer_config.json", {"model_max_length": "abc"}, ""),
        ("config.json", {"max_position_embeddings": -3}, "can't be built"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_damaged(folder, capsys, tmp_path, file, fields, said):
    shutil.copytree("runs", tmp_path / "runs")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}  # which reads tokenizer.json
    for name, changed in ((file, fields), ("tokenizer_config.json", fast)):
        path = tmp_path / "runs" / "ft0" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    write_csv(tmp_path / "val.csv", ("text", "label"),
              [(f"a g{'o' * 40}d soup", "positive"), ("bad soup", "negative")])  # fmt: skip
    line = f"greedy {tmp_path}/runs --text text --label label -o {tmp_path}/soup"
    assert main([*line.split(), "--data", f"{tmp_path}/val.csv"]) == (2 if said else 0)
    found = capsys.readouterr().err
    assert said in found
    assert not said or str(tmp_path) in found


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_does_not_publish_other_files(folder, capsys, tmp_path, file):
    """BERT's reads each line of "vocab" as a word, and transformers would save them."""
    shutil.copytree("runs", tmp_path / "runs")
    write_csv(tmp_path / "val.csv", ("text", "label"), texts(30, seed=0))
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN-----\nsecret\n")
    config = json.loads((tmp_path / "runs/ft0/tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "runs/ft0/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "runs/ft0/tokenizer.json").unlink(missing_ok=True)
    path = tmp_path / "runs" / "ft0" / file
    fields = {"vocab": str(secret), "vocab_file": str(secret), "unk_token": "-----BEGIN-----"}
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
    line = f"greedy {tmp_path}/runs --data {tmp_path}/val.csv --text text --label label"
    main([*line.split(), "-o", f"{tmp_path}/soup"])
    for written in (tmp_path / "soup").glob("*"):
        assert b"secret" not in written.read_bytes()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "name",
    [
        "AutoImageProcessor",
        "AutoTokenizer",
        "BertModel",
        "RagTokenizer",
        "pipeline",
        ["a"],
        "BertModelFast",
        "BertModelFastFast",
        "AutoTokenizerFastFastFast",
        "F" * 2000,
    ],
)
def test_a_tokenizer_of_another_class_is_refused(folder, capsys, tmp_path, monkeypatch, name, file):
    """AutoImageProcessor would ask on the standard input whether to run code of the folder."""
    shutil.copytree("runs/ft0", tmp_path / "ft0")
    (tmp_path / "ft0" / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "evil.Evil"}})
    )
    (tmp_path / "ft0" / "evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "ft0" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    with pytest.raises(CheckpointError, match="which is no tokenizer of transformers"):
        load_tokenizer(tmp_path / "ft0")


@pytest.mark.parametrize(
    "fields",
    [
        {"attribute_map": {"tokenizer_class": "x"}, "x": "BertModel"},
        {"__dict__": {"tokenizer_class": "BertModel", "_name_or_path": "", "_commit_hash": None}},
    ],
)
def test_fields_of_a_config_can_not_choose_the_class_of_a_tokenizer(folder, tmp_path, fields):
    shutil.copytree("runs/ft0", tmp_path / "ft0")
    config = tmp_path / "ft0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    (tmp_path / "ft0" / "tokenizer_config.json").unlink()
    models = transformers.PreTrainedModel
    with patch.object(models, "from_pretrained", side_effect=KeyError) as read:
        assert isinstance(load_tokenizer(tmp_path / "ft0"), transformers.BertTokenizer)
    assert not read.called


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, "BertTokenizer"),
        ({"model_type": "vit", "tokenizer_class": "BertTokenizer"}, "BertTokenizer"),
        ({"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}}, "BertTokenizer"),
    ],
)
def test_a_tokenizer_without_a_configuration_is_that_of_the_model(
    folder, tmp_path, config, expected
):
    shutil.copytree("runs/ft0", tmp_path / "ft0")
    (tmp_path / "ft0" / "config.json").write_text(json.dumps(config))
    (tmp_path / "ft0" / "tokenizer_config.json").unlink()
    assert type(load_tokenizer(tmp_path / "ft0")) is getattr(transformers, expected)


WORDS = [f"w{k}" for k in range(20)]


def save_gpts(folder: Path, is_adapter: bool) -> tuple[list[str], list[list[int]]]:
    """Classifiers trained with padding by "<end>"; texts, and the labels that each predicts.

    The tokenizer pads on the left, as is usual for generation, and has no token for padding.
    """
    t = transformers
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: k for k, w in enumerate(["<end>", *WORDS])}, "<end>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", padding_side="left"
    )
    config = t.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=21, pad_token_id=None)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(2, 9, size=40)]
    predicted = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.GPT2LMHeadModel(config).save_pretrained(folder / "base")
        for k in range(2):
            net = t.GPT2ForSequenceClassification.from_pretrained(folder / "base")
            if is_adapter:
                peft = pytest.importorskip("peft")
                settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"])
                net = peft.get_peft_model(net, settings)
            for parameter in net.parameters():
                parameter.data += torch.randn_like(parameter) * parameter.requires_grad
            net.eval().save_pretrained(str(folder / "runs" / f"ft{k}"))
            with torch.no_grad():
                each = [net(torch.tensor([tokenizer(line)["input_ids"]])) for line in lines]
            predicted.append([int(one.logits.argmax()) for one in each])
    for part in ("base", "runs/ft0", "runs/ft1"):
        tokenizer.save_pretrained(folder / part)
    return lines, predicted


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.filterwarnings("default:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
def test_padding_changes_no_score_of_a_decoder(tmp_path, capsys, is_adapter):
    lines, predicted = save_gpts(tmp_path, is_adapter)
    labels = [str(label) for label in predicted[1]]
    assert 0.1 < np.mean(np.equal(*predicted)) < 0.9
    write_csv(tmp_path / "val.csv", ("text", "label"), zip(lines, labels, strict=True))
    line = f"greedy {tmp_path}/runs --data {tmp_path}/val.csv --text text --label label"
    assert main([*line.split(), "-o", f"{tmp_path}/soup.safetensors", "--classes", "0", "1"]) == 0
    scores = Recipe.load(tmp_path / "soup.safetensors").scores
    assert scores == {"ft0": np.mean(np.equal(*predicted)), "ft1": 1.0}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, None]], "no token for some of the words"),
        ([[1, -5]], "the token -5, but the config.json has a vocabulary of 9"),
        ([[9, 1]], "the token 9, but"),
    ],
)
def test_what_a_tokenizer_returns_is_checked(ids, said):
    class Odd:
        name_or_path = "the/folder"
        model_max_length = 512

        def __call__(self, *texts, **options):
            return {"input_ids": np.array(ids) if "return_tensors" in options else ids}

    with pytest.raises(CheckpointError, match=f"The tokenizer in 'the/folder' .*{said}"):
        tokenize(Odd(), [["a b"]], None, {"vocab_size": 9})


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "CanineTokenizer"])
def test_tokenizers_without_a_vocabulary(tmp_path, name):
    given = getattr(transformers, name)()
    given.save_pretrained(tmp_path)
    found = load_tokenizer(find_tokenizer(None, str(tmp_path)))
    assert found("soup")["input_ids"] == given("soup")["input_ids"]


def test_texts_are_tokenized_in_parts(folder, monkeypatch):
    tokenizer = load_tokenizer(Path("runs/ft0"))
    lines = ["a soup", "a warm, fine soup", "bad", *["good soup"] * 20]
    whole = tokenizer(lines, padding=True, return_tensors="np")
    monkeypatch.setattr(tokenizer_module, "TOGETHER", 2)
    found = tokenize(tokenizer, [lines], None, {})
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    with pytest.warns(SoupWarning, match=r"of 24 texts has 42 tokens, but 95% have at most 7. .*7"):
        found = tokenize(tokenizer, [[*lines, "a " * 40]], None, {})
    assert found["input_ids"].shape == (24, 42)
    for kind, most in (("bert", 9), ("roberta", 7), ("xlm-roberta", 7)):
        sizes = {"model_type": kind, "max_position_embeddings": 9}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SoupWarning)
            assert tokenize(tokenizer, [["a " * 40]], None, sizes)["input_ids"].shape == (1, most)


def test_a_row_that_does_not_fit_the_network_is_told(folder, capsys, monkeypatch):
    """Without the lines of code, which are those of transformers; the first row fits."""
    forward = transformers.BertForSequenceClassification.forward

    def fails_later(self, input_ids, **inputs):
        if len(input_ids) > 1:
            raise IndexError("index out of range in self")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", fails_later)
    assert main(f"{TEXTS} val.csv".split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("sksoup: IndexError: index out of range in self\nThis was raised while")
    own = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: own(self, x) if len(x) < 2 else [][0])
    with pytest.raises(IndexError):  # of the user's code
        main(f"{NETS} val.npz".split())


def test_a_token_of_the_config_pads_where_the_tokenizer_has_none(folder):
    for config, token in (
        ({"pad_token_id": 2}, "[CLS]"),
        ({}, "[SEP]"),
        ({"pad_token_id": 99}, "[SEP]"),
    ):
        tokenizer = load_tokenizer(Path("runs/ft0"))
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
        set_padding(tokenizer, config, None)
        assert tokenizer.pad_token == token


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "fields", [{"vocab_file": "http://127.0.0.1/a"}, {"init_inputs": [["s3://b/c"]]}], ids=str
)
def test_a_tokenizer_that_could_be_fetched_is_refused(folder, tmp_path, file, fields):
    """With tiktoken, transformers 4 asks for the address."""
    shutil.copytree("runs/ft0", tmp_path / "ft0")
    path = tmp_path / "ft0" / file
    present = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(present | {"chat_template": "{{ 'https://a.b' }}"}))
    load_tokenizer(tmp_path / "ft0")
    path.write_text(json.dumps(present | fields))
    with pytest.raises(CheckpointError, match=rf"{file}' has the address .* fetch a file"):
        load_tokenizer(tmp_path / "ft0")


def test_a_model_with_a_tokenizer_that_loads_others_is_refused(folder, tmp_path):
    shutil.copytree("runs/ft0", tmp_path / "ft0")
    config = tmp_path / "ft0" / "config.json"
    config.write_text(json.dumps({"model_type": "rag"}))
    with pytest.raises(CheckpointError, match="which is no tokenizer of transformers"):
        load_tokenizer(tmp_path / "ft0")
    other = tmp_path / "ft0" / "config.4.0.0.json"
    other.write_text(json.dumps({"model_type": "bert", "tokenizer_class": "BertModel"}))
    config.write_text(json.dumps({"model_type": "bert", "configuration_files": [other.name]}))
    with pytest.raises(CheckpointError, match="names other configurations"):
        load_tokenizer(tmp_path / "ft0")


def test_version_4_has_two_tokenizers_of_a_model(folder, monkeypatch):
    pair = (None, transformers.BertTokenizerFast)
    monkeypatch.setattr(transformers, "TOKENIZER_MAPPING", {transformers.BertConfig: pair})
    assert load_tokenizer(Path("runs/ft0")).pad_token


def test_transformers_does_not_ask_whether_to_run_code(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    ask = transformers.dynamic_module_utils.resolve_trust_remote_code
    with offline(), pytest.raises(ValueError, match="custom code"):
        ask(None, "a", has_local_code=False, has_remote_code=True)


def test_the_tokenizer_of_a_soup_is_the_one_that_was_given(folder, tmp_path):
    write_csv(tmp_path / "val.csv", ("text", "label"), texts(30, seed=0))
    other = tmp_path / "other"
    shutil.copytree("runs/ft1", other)
    text = (other / "tokenizer.json").read_text().replace('"good"', '"quite"')
    (other / "tokenizer.json").write_text(text)
    Path("runs/ft0/vocab.txt").touch()  # of the tokenizer that is replaced
    line = f"greedy runs --data {tmp_path}/val.csv --text text --label label --tokenizer {other}"
    assert main([*line.split(), "-o", f"{tmp_path}/soup"]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "soup").iterdir()}
    assert "vocab.txt" not in written
    assert written["tokenizer.json"] == text.encode()
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "soup")
    given = transformers.AutoTokenizer.from_pretrained(other)
    Path("runs/ft0/vocab.txt").unlink()
    assert found("a quite good soup").input_ids == given("a quite good soup").input_ids


@pytest.mark.parametrize("option", ["--data", "--test"])
def test_a_file_that_is_given_twice(folder, capsys, option):
    with pytest.raises(SystemExit):
        main([*TABLE.split(), "--test", "table.csv", option, "other.csv"])
    assert f"argument {option}: given twice, expected one file" in capsys.readouterr().err


def test_validation_data_that_are_also_test_data_are_warned_of(folder, capsys):
    os.link("table.csv", "same.csv")
    for name in ("table.csv", "./table.csv", "same.csv"):
        assert main([*TABLE.split(), "--force", "--test", name]) == 0
        assert f"--test {name!r} is the file of --data" in capsys.readouterr().err
    shutil.copy("table.csv", "other.csv")
    assert main([*TABLE.split(), "--force", "--test", "other.csv"]) == 0
    assert "is the file of --data" not in capsys.readouterr().err
    Path("out.safetensors").unlink()


@pytest.mark.parametrize(
    ("labels", "line", "got"),
    [((0, "x", 1), 3, "'x'"), ((1, "01", 0), 3, "'01'"), ((2**60, 1, 0), 2, repr(str(2**60)))],
)
def test_a_test_label_that_is_no_integer_as_the_others_are(folder, capsys, labels, line, got):
    rows = [(*cells, k % 3) for k, cells in enumerate(np.eye(4)[[0, 1, 2, 3, 0, 1]].tolist())]
    write_csv(folder / "valid.csv", ("a", "b", "c", "d", "label"), rows)
    write_csv(folder / "odd.csv", ("a", "b", "c", "d", "label"), [(1, 2, 3, 4, y) for y in labels])
    assert main([*NETS.split(), "valid.csv", "--label", "label", "--test", "odd.csv"]) == 2
    said = capsys.readouterr().err
    assert f"'odd.csv', line {line}, column 'label': got the label {got}, expected an int" in said
    assert not Path("out.safetensors").exists()


def test_a_table_of_a_spreadsheet_gives_what_python_gives(folder, capsys):
    table = Path("table.csv").read_text().replace(",", ";")
    Path("sheet.csv").write_text("\ufeff" + table, "utf-8")
    line = "mehl nets --module model:build --data sheet.csv --delimiter ; --label species"
    line += " --inputs a --inputs b --inputs c --inputs d"
    options = "--layerwise --epochs 2 --lr 0.1 --model-batch-size all --seed 3 --batch-size 16"
    assert main([*line.split(), *options.split(), "-o", "m.safetensors", "--force"]) == 0
    assert "accuracy on the 60 validation examples: " in (said := capsys.readouterr().out)
    assert "(best checkpoint: " in said
    assert "optimistic" in said
    rows = np.loadtxt("table.csv", delimiter=",", dtype=str, skiprows=1)
    soup = MEHLSoup(layerwise=True, max_epochs=2, lr=0.1, model_batch_size=None, random_state=3,
                    batch_size=16)  # fmt: skip
    nets = CheckpointCollection.from_path("nets", module=Net)
    soup.fit(nets, rows[:, :4].astype(np.float32), rows[:, 4])
    found, expected = load_file("m.safetensors"), soup.state_dict()
    assert same_tensors({name: found[name] for name in expected}, expected)
    assert Recipe.load("m.safetensors").params == soup.recipe_.params


def test_targets_of_several_columns_and_the_order_of_labels(folder, capsys):
    rng = np.random.default_rng(0)
    rows = [(*rng.normal(size=7).round(3), *rng.integers(0, 2, 3)) for _ in range(20)]
    write_csv(folder / "many.csv", tuple("abcdxyzijk"), rows)
    line = "greedy nets --module model:build --data many.csv --json --force -o t.safetensors"
    columns = " ".join(f"--inputs {name}" for name in "abcd")
    for task, labels, metric in [("regression", "xyz", "R²"), ("multilabel", "ijk", "accuracy")]:
        targets = " ".join(f"--label {name}" for name in labels)
        assert main(f"{line} {columns} --task {task} {targets}".split()) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["metric"] == metric
        X, y = (np.array(rows)[:, part] for part in (slice(4), slice(4, 7)))
        if task == "regression":
            nets = CheckpointCollection.from_path("nets", module=Net)
            soup = GreedySoup(task="regression").fit(nets, X.astype(np.float32), y)
            assert document["scores"]["validation"] == pytest.approx(soup.score(X, y), abs=1e-6)
    assert main([*TABLE.split(), "--classes", "owl", "dog", "cat", "--force", "--json"]) == 0
    assert Recipe.load("out.safetensors").classes == ("owl", "dog", "cat")
    os.remove("out.safetensors")


def test_test_data_that_the_network_does_not_take(folder, capsys):
    with np.load("val.npz") as val:
        np.savez(folder / "int.npz", X=val["X"].astype(int), y=val["y"])
    assert main([*NETS.split(), "val.npz", "--test", "int.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["scores"]) == ["validation"]
    assert "was written, but can't be scored on 'int.npz'" in found["warnings"][-1]
    os.remove("out.safetensors")


def test_metrics_of_probabilities_and_of_several_labels(folder, capsys):
    line = [*TABLE.split(), "--force", "--json", "--scoring", "roc_auc_ovr", "--classes"]
    order = ["owl", "dog", "cat"]
    assert main([*line, *order]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = np.loadtxt("table.csv", delimiter=",", dtype=str, skiprows=1)
    net = Net().eval()
    net.load_state_dict(load_file("out.safetensors"), strict=False)
    with torch.no_grad():
        p = net(torch.as_tensor(rows[:, :4].astype(np.float32))).softmax(dim=1)
    each = [roc_auc_score(rows[:, 4] == label, p[:, k]) for k, label in enumerate(order)]
    assert document["scores"]["validation"] == pytest.approx(np.mean(each))
    two = [row for row in rows if row[4] != "cat"]
    write_csv(folder / "two.csv", (*"abcd", "species"), two)
    assert main([*line, *order, "--test", "two.csv"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == document["scores"]
    assert "was written, but can't be scored on 'two.csv'" in found["warnings"][-1]
    os.remove("out.safetensors")
    rng = np.random.default_rng(0)
    many = [(*rng.normal(size=4).round(3), *rng.integers(0, 2, 3)) for _ in range(20)]
    write_csv(folder / "several.csv", tuple("abcdxyz"), many)
    data = "--data several.csv --task multilabel --label x --label y --label z --json"
    line = f"nets --module model:build {data} --scoring f1_micro"
    assert main(["greedy", *line.split(), "-o", "out.safetensors"]) == 0
    score = json.loads(capsys.readouterr().out)["scores"]["validation"]
    tested = ["--system", "Greedy-Soup", "--test", "several.csv"]
    assert main(["compare", *line.split(), *tested]) == 0
    greedy = json.loads(capsys.readouterr().out)["results"][-1]
    assert 0 < greedy["test"] < 1
    assert greedy["held_out"] == pytest.approx(greedy["test"])
    net.load_state_dict(load_file("out.safetensors"), strict=False)
    X, y = np.array(many)[:, :4].astype(np.float32), np.array(many)[:, 4:]
    with torch.no_grad():
        assert score == pytest.approx(f1_score(y, net(torch.as_tensor(X)) > 0, average="micro"))
    os.remove("out.safetensors")


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["01", "1", "2"], ["01", "1", "2"]), (["7", "007"], ["7", "007"]),
        (["01", "02", "10"], [1, 2, 10]), (["1.0", "2", " 2"], [1, 2, 2]), (["-1", "+1"], [-1, 1]),
    ],
)  # fmt: skip
def test_labels_that_differ_in_leading_zeros_are_texts(tmp_path, cells, labels):
    write_csv(tmp_path / "a.csv", ("x", "y"), [(cell, 0) for cell in cells])
    assert read_file(tmp_path / "a.csv").labels("x").tolist() == labels


def test_names_that_the_output_can_not_encode_are_escaped(monkeypatch):
    """As a pipe on Windows, of an older encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    _print("é 模")
    assert out.buffer.getvalue().decode("cp1252").strip() == r"é \u6a21"


def test_a_column_of_texts_is_no_column_of_labels(tmp_path):
    """An array of them would take as much for each row as the longest."""
    rows = [("x" * (10**6 if k == 3 else 2), 0) for k in range(6)]
    write_csv(tmp_path / "a.csv", ("x", "y"), rows)
    with pytest.raises(ValueError, match=r"a\.csv', line 5, column 'x': got a label of 1,000,000"):
        read_file(tmp_path / "a.csv").labels("x")


def test_warnings_are_lines_on_stderr_and_part_of_json(folder, capsys):
    line = (
        "greedy nets/ft0.safetensors --module model:build --data val.npz --force -o w.safetensors"
    )
    assert main(line.split()) == 0
    said = capsys.readouterr().err
    assert "sksoup: warning: There is one checkpoint only, 'ft0'" in said
    assert ".py:" not in said
    assert main([*line.split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert any("There is one checkpoint" in w for w in json.loads(printed.out)["warnings"])


def test_warnings_of_others_are_shown_without_what_a_terminal_obeys(monkeypatch):
    """transformers quotes tokens of a tokenizer's files."""
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda text, *args: shown.append(text))
    with _shown_warnings(False):
        warnings.showwarning(UserWarning("odd \x1b]0;token\x07"), UserWarning, "file.py", 1)
    assert shown == [r"odd \x1b]0;token\x07"]


def test_compare_prints_the_table_of_the_systems_that_were_asked_for(folder, capsys):
    line = "compare nets --module model:build --data val.npz --test test.npz --system Greedy-Soup"
    assert main(line.split()) == 0
    assert "Greedy-Soup" in (table := capsys.readouterr().out)
    assert "HL-Soup" not in table
    assert main([*line.split(), "--json", "--scoring", "f1_macro"]) == 0
    best, greedy = json.loads(capsys.readouterr().out)["results"]
    assert (best["system"], greedy["system"]) == ("Best checkpoint", "Greedy-Soup")
    assert greedy["difference"] is not None
    with pytest.raises(SystemExit):  # needs test data
        main(["compare", "nets", "--module", "model:build", "--data", "val.npz"])


def test_the_best_checkpoint_is_scored_on_the_test_data_too(folder, capsys):
    line = "nets --module model:build --data val.npz --test test.npz --json --force"
    nets = CheckpointCollection.from_path("nets", module=Net)
    val, test = (np.load(f"{name}.npz") for name in ("val", "test"))
    best = BestCheckpoint().fit(nets, val["X"], val["y"])
    for command in ("greedy", "mehl --epochs 1"):
        assert main(f"{command} {line} -o b.safetensors".split()) == 0
        found = json.loads(capsys.readouterr().out)["best_checkpoint"]
        assert found["validation"] == pytest.approx(best.score(val["X"], val["y"]))
        assert found["test"] == pytest.approx(best.score(test["X"], test["y"]))
    assert main(f"greedy {line} -o b.safetensors".replace("--json", "").split()) == 0
    said = capsys.readouterr().out
    assert said.count("(best checkpoint: ") == 2
    assert "`sksoup compare` tells whether a difference is more than chance." in said


def test_compare_names_the_methods_that_warn(folder, capsys):
    line = "compare nets/ft0.safetensors --module model:build --data val.npz --test test.npz"
    assert main([*line.split(), "--system", "Greedy-Soup"]) == 0
    said = capsys.readouterr().err
    assert said.count("There is one checkpoint only") == 1
    assert "sksoup: warning: all methods: There is one checkpoint only" in said


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 0.1"])
def test_numbers_of_rows_are_no_input(folder, capsys, tmp_path, name):
    lines = Path("table.csv").read_text().splitlines()
    numbered = [f"{name},{lines[0]}", *(f"{k},{line}" for k, line in enumerate(lines[1:]))]
    (tmp_path / "val.csv").write_text("\n".join(numbered))
    results = []
    for file in ("table.csv", f"{tmp_path}/val.csv"):
        line = f"{NETS} {file} --label species"
        assert main([*line.split(), "--json", "--force"]) == 0
        found = json.loads(capsys.readouterr().out)
        said = [each for each in found.pop("warnings", []) if "column without a name" in each]
        assert len(said) == (file != "table.csv")
        found.pop("seconds", None)
        results.append(found)
    assert results[0] == results[1]


def test_columns_of_the_test_table_are_those_of_the_validation_table_by_name(folder, capsys):
    header, *rows = [line.split(",") for line in Path("table.csv").read_text().splitlines()]
    order = [header.index(name) for name in ("species", *"dbca")]
    write_csv(Path("moved.csv"), tuple(header[k] for k in order),
              [[row[k] for k in order] for row in rows])  # fmt: skip
    line = [*TABLE.split(), "--json", "--force", "--test"]
    scores = []
    for test in ("table.csv", "moved.csv"):
        assert main([*line, test]) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"]["test"])
    assert scores[0] == scores[1]
    write_csv(Path("lacks.csv"), ("id", *header[1:]), rows)
    assert main([*line, "lacks.csv"]) == 2
    assert f"'lacks.csv' has no column {header[0]!r}" in capsys.readouterr().out


def test_messages_advise_in_options_and_not_in_python(folder, capsys):
    data = "nets --module model:build --data val.npz --force -o a.safetensors"
    assert main(f"greedy {data} --min-improvement 2".split()) == 0
    said = capsys.readouterr().err
    assert "more is needed (min_improvement). `sksoup mehl` learns coefficients instead." in said
    assert main(f"mehl {data} --lr 1000 --epochs 1".split()) == 0
    said = capsys.readouterr().err
    assert "The soup is the " in said
    assert "held_out_scores_" not in said
    rows = np.load("val.npz")
    np.savez("digits.npz", X=rows["X"], y=np.resize(["9", "10", "11"], len(rows["y"])))
    assert main(f"greedy {data.replace('val', 'digits')}".split()) == 0
    said = capsys.readouterr().err
    assert "in the order of the outputs with --classes." in said
    assert "classes=[" not in said
