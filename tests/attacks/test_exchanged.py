"""A private folder of a save that others exchange, where they may write beside the target."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from sksoup import CheckpointCollection, UniformSoup
from sksoup.checkpoints import workplace, write
from sksoup.checkpoints.hub_companions import model_folders
from sksoup.cli.output import write_soup

from .test_writes import names, place_of_save


def test_a_private_folder_that_is_exchanged_meanwhile(tmp_path):
    """Whoever may write to the folder of the target can rename it, and put a link in its place."""
    mine = tmp_path / "mine"
    (mine / "part").mkdir(parents=True)
    for name in ("lock", ".tmp1", "part/a"):
        (mine / name).write_text("precious")
    shared = tmp_path / "shared"
    shared.mkdir()
    with workplace.workplace(shared / "out") as part:
        (place := part.parent.resolve()).rename(shared / "moved")
        place.symlink_to(mine)
    assert sorted(str(path.relative_to(mine)) for path in mine.rglob("*")) == [
        ".tmp1", "lock", "part", "part/a",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def soups(tmp_path_factory):
    """A soup of folders of transformers, and one of PEFT's adapters."""
    folder = tmp_path_factory.mktemp("soups")
    pytest.importorskip("peft")
    adapters = importlib.import_module("tests.adapters")  # which needs peft
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(config)
    for k in range(2):
        with torch.no_grad():
            network.classifier.bias += k
        network.save_pretrained(folder / "runs" / f"run{k}")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcde"]
        (folder / "runs" / f"run{k}" / "vocab.txt").write_text("\n".join(words))
    ids = torch.randint(9, (6, 5))
    adapters.save_adapters(folder / "adapters", 2)
    X, y = adapters.rows(6)
    lora = CheckpointCollection.from_path(folder / "adapters", module=adapters.build)
    return (
        UniformSoup().fit([*(folder / "runs").iterdir()], {"input_ids": ids}, np.arange(6) % 3),
        UniformSoup().fit(lora, X, y),
    )


def tokenizer_of(soup):
    return model_folders(soup.checkpoints_, soup.ingredients_)[0]


SAVES = {
    "folder": lambda soup, lora, out: soup.save_pretrained(out),
    "command": lambda soup, lora, out: write_soup(out, soup, tokenizer_of(soup)),
    "shards": lambda soup, lora, out: soup.recipe_.cook(soup.checkpoints_, out),
    "adapter": lambda soup, lora, out: lora.save_adapter(out),
    "safetensors": lambda soup, lora, out: soup.save(out.with_suffix(".safetensors")),
    "torch": lambda soup, lora, out: soup.save(out.with_suffix(".pt")),
    "text": lambda soup, lora, out: soup.recipe_.save(out.with_suffix(".json")),
}


@pytest.mark.skipif(not workplace.OPENED.is_dir(), reason="no paths of open folders here")
@pytest.mark.parametrize("save", SAVES)
def test_all_of_a_save_is_in_the_folder_that_was_made(soups, tmp_path, monkeypatch, save):
    """Even if others exchange it at any time; the soup still comes to its name."""
    SAVES[save](*soups, tmp_path / "soup")
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    (mine / "part").mkdir(parents=True)
    opened = workplace._opened

    @contextmanager
    def exchanging(folder):
        with opened(folder) as place:
            for path in shared.iterdir():  # also when a folder is made in one of these
                if path.is_dir() and not path.is_symlink():
                    path.rename(shared / f"moved{len(names(shared))}")
                    path.symlink_to(mine)
            yield place

    monkeypatch.setattr(workplace, "_opened", exchanging)
    monkeypatch.setattr(workplace, "MOST_FOLDERS", 3)
    SAVES[save](*soups, shared / "soup")
    assert sorted(mine.rglob("*")) == [mine / "part"]
    written = {path.relative_to(shared) for path in shared.rglob("soup*")}
    assert written == {path.relative_to(tmp_path) for path in tmp_path.glob("soup*")}
    for path in tmp_path.glob("soup"):
        assert names(shared / "soup") == names(path)
    assert not any(path.is_symlink() for path in shared.glob("soup*"))


def test_what_is_moved_to_a_folder_before_it_is_private_is_kept(tmp_path, monkeypatch):
    judge, place = workplace._is_private, place_of_save(tmp_path / "a")

    def moving(*args):
        (place / "part" / "thesis").mkdir(parents=True)
        monkeypatch.setattr(workplace, "_is_private", judge)
        return judge(*args)

    monkeypatch.setattr(workplace, "_is_private", moving)
    write.write_text(tmp_path / "a", "{}")
    assert names(place) == ["part"]
    assert names(place / "part") == ["thesis"]


def test_a_folder_of_others_in_place_of_the_private_one_is_not_used(tmp_path, monkeypatch):
    """Nor one with other files, a link or a file: another name is taken."""
    place = place_of_save(tmp_path / "a")
    opened = workplace._opened

    def planted():
        place.mkdir()
        (place / "part").touch()

    for plant in (planted, lambda: place.symlink_to(tmp_path), place.touch):

        @contextmanager
        def exchanging(folder, plant=plant):
            if folder == place and folder.is_dir():
                folder.rmdir()
                plant()
            with opened(folder) as found:
                yield found

        monkeypatch.setattr(workplace, "_opened", exchanging)
        with workplace.workplace(tmp_path / "a") as part:
            assert part.parent.resolve() == place.with_name(place.name.replace("-0", "-1"))
            assert names(tmp_path) == [place.name, part.parent.resolve().name]
        if plant is planted:
            assert names(place) == ["part"]
            shutil.rmtree(place)
        else:
            place.unlink()
        assert names(tmp_path) == []


def test_an_empty_folder_in_place_of_the_private_one_becomes_private(tmp_path, monkeypatch):
    opened = workplace._opened

    @contextmanager
    def exchanging(folder):
        if folder.is_dir():
            folder.chmod(0o777)
        with opened(folder) as found:
            yield found

    monkeypatch.setattr(workplace, "_opened", exchanging)
    with workplace.workplace(tmp_path / "a") as part:
        assert part.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_exchanged_each_time_is_an_error(tmp_path, monkeypatch):
    def exchanging(folder):
        folder.rmdir()
        raise NotADirectoryError

    monkeypatch.setattr(workplace, "_opened", exchanging)
    with (
        pytest.raises(FileExistsError, match=r"'a' can't be written: 1,000 temporary"),
        workplace.workplace(tmp_path / "a"),
    ):
        pytest.fail("it was used")
    assert names(tmp_path) == []


@pytest.mark.parametrize("of", ["others", "all", "this user"])
def test_only_leftovers_that_nobody_else_can_have_filled_are_removed(tmp_path, monkeypatch, of):
    """Somebody else could have moved a folder of this user to the name of what a save writes."""
    place = place_of_save(tmp_path / "a")
    (place / "part" / "thesis").mkdir(parents=True)
    (place / workplace.LOCK).touch()
    place.chmod(0o777 if of == "all" else 0o700)
    if of == "others":
        owner = place.stat().st_uid
        monkeypatch.setattr(workplace.os, "geteuid", lambda: owner + 1)
    write.write_text(tmp_path / "a", "{}")
    assert (place / "part" / "thesis").exists() == (of != "this user")
    assert place.exists() == (of != "this user")


def test_a_lock_of_others_is_not_waited_for(tmp_path, monkeypatch):
    """Nobody else can open the lock of a private folder."""
    fcntl = pytest.importorskip("fcntl")
    judge, held = workplace._is_private, []

    def exchanged(place, lock):
        if held:
            return judge(place, lock)
        held.append(os.open(place / workplace.LOCK, os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False

    monkeypatch.setattr(workplace, "_is_private", exchanged)
    write.write_text(tmp_path / "a", "{}")
    os.close(held[0])
    assert names(tmp_path) == ["a"]


def test_only_a_folder_of_this_user_that_nobody_else_can_write_to_is_private(tmp_path, monkeypatch):
    tmp_path.chmod(0o2777)
    with (tmp_path / workplace.LOCK).open("xb") as lock:
        assert workplace._is_private(tmp_path, lock)
        assert tmp_path.stat().st_mode & 0o7777 == 0o2700  # its files have the group of the folder
        (tmp_path / "part").touch()  # before the folder was private
        assert not workplace._is_private(tmp_path, lock)
        (tmp_path / "part").unlink()
        status = os.fstat(lock.fileno())
        other = os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
        monkeypatch.setattr(workplace.os, "fstat", lambda file: other)
        assert not workplace._is_private(tmp_path, lock)


@pytest.mark.parametrize("opened", ["/none", "/etc"])
def test_without_paths_of_open_folders_a_save_is_the_same(soups, tmp_path, monkeypatch, opened):
    """As on macOS and Windows; some systems have the paths, but nothing below them."""
    monkeypatch.setattr(workplace, "OPENED", Path(opened))
    for name, save in SAVES.items():
        (tmp_path / name).mkdir()
        save(*soups, tmp_path / name / "soup")
        assert all(path.name.startswith("soup") for path in (tmp_path / name).iterdir())
    with workplace.workplace(tmp_path / "a") as part:
        assert part.parent.parent == tmp_path
        part.touch()
    assert names(tmp_path) == sorted(SAVES)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in (workplace.LOCK, "part"):
        (mine / name).touch()
    place_of_save(tmp_path / "a").symlink_to(mine)
    write.write_text(tmp_path / "a", "{}")
    assert names(mine) == [workplace.LOCK, "part"]


def test_the_error_of_a_save_names_its_target(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "a.json"))) as error,
        write._replacing(tmp_path / "a.json") as part,
    ):
        part.read_text()
    assert "/proc" not in str(error.value)
    with (
        pytest.raises(FileNotFoundError) as error,
        write.new_folder(tmp_path / "soup") as folder,
        write._replacing(folder / "a.json") as part,
    ):
        part.read_text()
    assert str(tmp_path / "soup") in str(error.value)
    assert "/proc" not in "".join([str(error.value), *error.value.__notes__])


def test_the_mode_of_what_a_planted_link_leads_to_is_not_taken(tmp_path):
    """A soup beside links in /tmp could become writable for all, as /dev/null is."""
    (tmp_path / "new").touch()
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o777)
    for name in ("a.json", "b.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "open")
    write.write_text(tmp_path / "a.json", "{}")
    write.write_safetensors(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    for name in ("a.json", "b.safetensors"):
        assert (tmp_path / name).lstat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_mode_of_a_folder_of_others_is_not_taken(tmp_path, monkeypatch):
    """Somebody else could have made the empty folder that the new one replaces, open to all."""
    target = tmp_path / "soup"
    target.mkdir()
    target.chmod(0o777)
    status = os.fstat

    def of_others(file):
        found = status(file)
        return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))

    (tmp_path / "new").mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", of_others)
        write._copy_mode(target, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    write._copy_mode(target, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777
