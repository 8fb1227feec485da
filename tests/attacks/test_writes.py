"""What others in a shared folder can do to a save: nothing that lasts."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, Recipe, UniformSoup
from sksoup.__main__ import main
from sksoup.checkpoints import workplace, write
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.cli.output import move_up

HELD = """
import runpy, sys
from pathlib import Path

workplace = runpy.run_path(sys.argv[2])["workplace"]  # without the import of torch
with workplace(Path(sys.argv[1])) as part:
    part.write_text("half of it")
    print(part.parent.resolve(), flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def place_of_save(target):
    """The private folder that the next save to the target makes."""
    with workplace.workplace(target) as part:
        return part.parent.resolve()


def test_threads_that_save_to_one_name_leave_whole_files(tmp_path):
    """They share a process number, as processes in containers do."""
    path, errors = tmp_path / "soup.safetensors", []
    write.write_safetensors(path, {"w": torch.zeros(50_000)})
    done = threading.Event()

    def save(value):
        try:
            for _ in range(25):
                write.write_safetensors(path, {"w": torch.full((50_000,), value)})
        except OSError as error:
            errors.append(error)

    def read():
        while not done.is_set():
            try:
                assert len(load_file(path)["w"].unique()) == 1
            except Exception as error:
                errors.append(error)

    savers = [threading.Thread(target=save, args=(float(k),)) for k in range(4)]
    reader = threading.Thread(target=read)
    for thread in [reader, *savers]:
        thread.start()
    for thread in savers:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert names(tmp_path) == ["soup.safetensors"]


def test_two_saves_to_one_name_have_places_of_their_own(tmp_path):
    with (
        workplace.workplace(tmp_path / "a") as first,
        workplace.workplace(tmp_path / "a") as second,
    ):
        assert first != second
        assert first.parent.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == []


@pytest.mark.parametrize("save", ["text", "weights", "folder"])
def test_a_planted_link_is_not_followed(tmp_path, save):
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    shared.mkdir()
    for name in (place_of_save(shared / "out").name, f".out.{os.getpid()}.tmp"):
        (shared / name).symlink_to(victim / "precious" if save == "text" else victim)
    if save == "text":
        write.write_text(shared / "out", "{}")
    elif save == "weights":
        write.write_safetensors(shared / "out", {"w": torch.ones(2)})
    else:
        with write.new_folder(shared / "out") as temporary:
            (temporary / "part").write_text("weights")
    assert names(victim) == ["precious"]
    assert (victim / "precious").read_text() == "precious"
    assert not (shared / "out").is_symlink()


def start_saving(path):
    command = [sys.executable, "-c", HELD, path, workplace.__file__]
    saving = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return saving, saving.stdout.readline().strip()


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    path = tmp_path / "soup.json"
    (alive, held), (killed, left) = start_saving(path), start_saving(path)
    other, elsewhere = start_saving(tmp_path / "other.json")
    for process in (killed, other):
        process.kill()
        process.communicate()
    assert os.path.exists(left)
    write.write_text(path, "{}")
    assert not os.path.exists(left)
    assert os.path.exists(elsewhere)  # of another target: removed by the next save to that
    with open(os.path.join(held, "part")) as part:
        assert part.read() == "half of it"
    alive.communicate("")
    assert names(tmp_path) == sorted(["soup.json", os.path.basename(elsewhere)])


def test_a_folder_that_was_left_before_it_had_a_lock_is_removed(tmp_path):
    place_of_save(tmp_path / "a").mkdir()
    write.write_text(tmp_path / "a", "{}")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["soup.safetensors", "soup.pt", "folder"])
def test_what_is_replaced_keeps_who_may_read_it(name, zoo, tmp_path):
    target = tmp_path / name
    target.mkdir() if name == "folder" else target.touch()
    target.chmod(mode := 0o700 if name == "folder" else 0o600)
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    if name == "folder":
        write.write_shards(
            target, {"w": TensorInfo((2,), torch.float32)}, lambda _: iter([("w", torch.ones(2))])
        )
    else:
        soup.save(target)
    assert target.stat().st_mode & 0o777 == mode
    write.write_text(tmp_path / "new", "{}")
    assert (tmp_path / "new").stat().st_mode & 0o077  # as the umask says


@pytest.mark.parametrize("name", [".", "../here", "sub/..", "../link/here"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, name):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(here)
    with (
        pytest.raises(FileExistsError, match="is the current folder"),
        write.new_folder(Path(name)),
    ):
        pytest.fail("the folder was prepared")
    assert names(tmp_path) == ["here", "link"]


def test_a_folder_without_the_lock_of_a_save_is_left_alone(tmp_path):
    place = place_of_save(tmp_path / "a")
    place.mkdir()
    (place / "precious").touch()
    write.write_text(tmp_path / "a", "{}")
    assert names(place) == ["precious"]


@pytest.mark.parametrize(
    ("name", "lock"),
    [("precious", "lock"), ("precious", workplace.LOCK), ("part.safetensors", "lock"),
     ("part.safetensors", workplace.LOCK), ("part", "lock")],
)  # fmt: skip
def test_a_folder_that_was_given_the_name_of_a_save_keeps_its_files(tmp_path, name, lock):
    """Who may rename folders beside a target could have its next save remove one with a lock."""
    place = place_of_save(tmp_path / "a")
    victim = tmp_path / "results"
    victim.mkdir()
    (victim / lock).touch()
    (victim / name).touch()
    victim.rename(place)
    write.write_text(tmp_path / "a", "{}")
    assert name in names(place)


def test_a_folder_of_that_name_while_the_save_runs_keeps_its_files(tmp_path):
    victim = tmp_path / "results"
    victim.mkdir()
    (victim / "precious").touch()
    with workplace.workplace(tmp_path / "a") as part:
        (place := part.parent.resolve()).rename(tmp_path / "away")
        victim.rename(place)
    assert names(place) == ["precious"]


def test_all_that_a_killed_save_had_written_is_removed(tmp_path):
    (alive, held), (killed, left) = start_saving(tmp_path / "a"), start_saving(tmp_path / "a")
    for process in (alive, killed):
        process.kill()
        process.communicate()
    with open(os.path.join(left, ".tmpDtxiDH"), "w"):
        pass  # as safetensors leaves it
    os.remove(os.path.join(held, "part"))
    os.makedirs(os.path.join(held, "part", "shards"))
    write.write_text(tmp_path / "a", "{}")
    assert names(tmp_path) == ["a"]


def test_a_link_to_nothing_does_not_say_where_a_folder_is_written(tmp_path):
    (tmp_path / "soup").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(FileExistsError, match="soup' exists and is not an empty folder"),
        write.new_folder(tmp_path / "soup"),
    ):
        pytest.fail("work was done")
    assert names(tmp_path) == ["soup"]


def test_a_link_to_nothing_is_not_replaced_without_force(tmp_path, capsys):
    write.write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    for name in ("out.safetensors", "out"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
        arguments = ["average", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / name)]
        assert main(arguments) == 2
        assert "exists" in capsys.readouterr().err
        assert (tmp_path / name).is_symlink()
    collection = CheckpointCollection({"out": {"w": torch.ones(2)}})
    with pytest.raises(FileExistsError, match=r"out\.safetensors' already exists"):
        collection.save(tmp_path)


@pytest.mark.parametrize("name", ["n" * 243 + ".safetensors", "ü" * 121 + "n.safetensors"])
def test_the_longest_names_are_written(tmp_path, name):
    assert len(os.fsencode(name)) == 255
    write.write_safetensors(tmp_path / name, {"w": torch.ones(2)})
    assert CheckpointCollection([tmp_path / name]).layout["w"].shape == (2,)
    with write.new_folder(tmp_path / name.replace("safetensors", "_safetensor")) as part:
        write.write_text(part / name, "{}")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [("n" * 256, OSError, "File name too long"), ("a\0b", ValueError, "null")],
)
def test_a_name_that_can_not_be_one_is_said_before_any_work(tmp_path, name, error, match):
    for writer in (write.new_folder, write._replacing):
        with pytest.raises(error, match=match), writer(tmp_path / name):
            pytest.fail("work was done")
    assert names(tmp_path) == []


def test_the_folders_of_saves_are_no_checkpoints(tmp_path):
    write.write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    with write.new_folder(tmp_path / "model") as part:
        write.write_safetensors(part / "model.safetensors", {"w": torch.ones(2)})
        assert CheckpointCollection.from_path(tmp_path).names == ("a",)
    shutil.rmtree(tmp_path / "model")
    left = tmp_path / f"{workplace.MARK}0.tmp"  # as another user's, which can't be looked into
    left.mkdir()
    (left / "config.json").write_text("{}")
    write.write_safetensors(left / "model.safetensors", {"w": torch.ones(2)})
    assert CheckpointCollection.from_path(tmp_path).names == ("a",)


def save_safetensors(folder):
    write.write_safetensors(folder / "soup", {"w": torch.zeros(3)})  # which replaces the link


def save_torch(folder):
    with pytest.raises(FileExistsError, match="soup"):
        write.write_torch(folder / "soup", {"w": torch.zeros(3)}, folder / "soup.json", "{}")


def save_text(folder):
    with pytest.raises(FileExistsError, match="soup"):
        write.write_text(folder / "soup", "{}")


@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_text])
def test_a_link_that_is_planted_in_the_middle_of_a_save_is_not_written_through(
    tmp_path, monkeypatch, save
):
    """Those who may rename here can put a folder of their own in the place of the private one."""
    victim, target = tmp_path / "victim", tmp_path / "soup"
    victim.write_text("kept")
    victim.chmod(0o600)

    @contextmanager
    def planting(path):
        with workplace.workplace(path) as part:
            if path == target:
                part.symlink_to(victim)
            yield part

    monkeypatch.setattr(write, "workplace", planting)
    save(tmp_path)
    assert victim.read_text() == "kept"
    assert victim.stat().st_mode & 0o777 == 0o600
    assert not target.is_symlink()


TWO = CheckpointCollection([{"w": torch.zeros(200, 200)}, {"w": torch.ones(200, 200)}])
RECIPES = [Recipe.record("x", TWO, [c, 1 - c], layers={"w": 0}) for c in (0.25, 0.5)]


def save_soup(path: Path, k: int) -> None:
    """One of two soups, in two files: the weights say which it is."""
    RECIPES[k].save_weights(path, {"w": torch.full((200, 200), float(k))})


def is_whole(path: Path) -> bool:
    k = int(torch.load(path, weights_only=True)["w"][0, 0])
    return np.array_equal(Recipe.load(path).coef, RECIPES[k].coef)


def test_the_last_of_two_saves_of_a_torch_file_wins_with_both_files(tmp_path):
    path = tmp_path / "soup.pt"
    for _ in range(50):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save_soup, [path, path], [0, 1]))
        assert is_whole(path)
    assert names(tmp_path) == ["soup.pt", "soup.recipe.json"]


def test_a_lock_of_another_program_is_not_waited_for(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(workplace, "WAIT", 0.1)
    file = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    save_soup(tmp_path / "soup.pt", 1)
    os.close(file)
    assert is_whole(tmp_path / "soup.pt")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", ["fsync", "replace", "Ctrl-C"])
def test_a_torch_file_that_fails_leaves_the_old_recipe(tmp_path, monkeypatch, before, step):
    """As on disks that are found to be full, or where the old weights are in use, at the end."""
    path = tmp_path / "soup.pt"
    if before:
        save_soup(path, 0)
    kept = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    fsync, replace = os.fsync, Path.replace

    def full(file):
        if os.fstat(file).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    def in_use(source, target):
        if target == path:
            raise PermissionError(errno.EACCES, "The file is in use")
        return replace(source, target)

    def stopped(source, target):
        if target == path:
            raise KeyboardInterrupt
        return replace(source, target)

    with monkeypatch.context() as patch:
        changed = {"fsync": (os, "fsync", full), "replace": (Path, "replace", in_use)}
        patch.setattr(*changed.get(step, (Path, "replace", stopped)))
        with pytest.raises((OSError, KeyboardInterrupt)):
            save_soup(path, 1)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == kept
    save_soup(path, 1)
    assert is_whole(path)


def test_a_link_to_itself_as_output_is_only_replaced_with_force(tmp_path, capsys):
    for k in range(2):
        (tmp_path / "runs").mkdir(exist_ok=True)
        save_file({"w": torch.ones(2)}, tmp_path / "runs" / f"{k}.safetensors")
    out = tmp_path / "loop.safetensors"
    out.symlink_to(out.name)
    arguments = ["average", str(tmp_path / "runs"), "-o", str(out)]
    assert main(arguments) == 2
    assert "loop.safetensors" in capsys.readouterr().err
    assert out.is_symlink()
    assert main([*arguments, "--force"]) == 0
    assert out.is_file()
    assert not out.is_symlink()


@pytest.mark.parametrize("inner", ["soup", "soup_"])
def test_a_folder_is_moved_up_that_holds_one_of_its_name(tmp_path, inner):
    """modules.json may name a module "soup"."""
    (tmp_path / "soup" / inner).mkdir(parents=True)
    (tmp_path / "soup" / inner / "config.json").write_text("{}")
    (tmp_path / "soup" / "a").write_text("a")
    move_up(tmp_path / "soup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", inner]
    assert (tmp_path / inner / "config.json").read_text() == "{}"


def test_a_file_system_that_keeps_removed_files_until_they_are_closed(tmp_path, monkeypatch):
    """As clients of NFS do, by another name; no folder is left."""
    unlink, opened = Path.unlink, workplace._opened
    kept: list[Path] = []

    @contextmanager
    def closing(folder):
        with opened(folder) as place:
            yield place
            for path in kept:  # once the lock is closed
                unlink(path)
            kept.clear()

    def renamed(self, missing_ok=False):
        if self.name == workplace.LOCK:
            kept.append(self.rename(self.with_name(".nfs1")))
        else:
            unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(workplace, "_opened", closing)
    monkeypatch.setattr(Path, "unlink", renamed)
    with workplace.workplace(tmp_path / "a") as part:
        part.write_text("a")
        part.rename(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_all_that_is_in_a_new_folder_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """Also what was copied, such as a tokenizer."""
    flushed = []
    fsync, replace = os.fsync, Path.replace

    def noted(file):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def moved(self, target):
        flushed.append("moved")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", moved)
    with write.new_folder(tmp_path / "out") as folder:
        (folder / "1_Dense").mkdir()
        (folder / "1_Dense" / "model.safetensors").write_bytes(b"x")
        (folder / "config.json").write_text("{}")
    before = flushed[: flushed.index("moved")]
    assert {"model.safetensors", "config.json", "1_Dense", "part"} <= set(before)


def test_ctrl_c_without_hard_links_restores_the_recipe(tmp_path, monkeypatch):
    ckpts = CheckpointCollection([{"w": torch.zeros(4)}, {"w": torch.ones(4)}])
    recipes = [Recipe.record("r", ckpts, [[1 - k, k]], layers={"w": 0}) for k in (0.5, 0.25)]
    recipes[0].save_weights(tmp_path / "s.pt", recipes[0].cook(ckpts))
    before = (tmp_path / "s.recipe.json").read_text()
    replace = Path.replace

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no hard links")

    def interrupted(self, target):
        if str(target).endswith(".pt"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipes[1].save_weights(tmp_path / "s.pt", recipes[1].cook(ckpts))
    assert (tmp_path / "s.recipe.json").read_text() == before
    assert recipes[0].verify(tmp_path / "s.pt", ckpts).ok


def test_what_is_copied_or_written_again_follows_no_link(tmp_path):
    private, source = tmp_path / "private", tmp_path / "source"
    private.write_text("precious")
    source.write_text("other")
    link = tmp_path / "link"
    link.symlink_to(private)
    with pytest.raises(FileExistsError):
        write.copy_new(source, link)
    write.write_anew(link, "text")
    assert (link.read_text(), link.is_symlink()) == ("text", False)
    assert private.read_text() == "precious"
    folder, away = tmp_path / "folder", tmp_path / "away"
    folder.mkdir(mode=0o700)
    source.chmod(0o777)
    away.symlink_to(folder)
    with pytest.raises(OSError):  # noqa: PT011 - its class differs by system
        write._copy_mode(source, away)
    assert folder.stat().st_mode & 0o777 == 0o700
