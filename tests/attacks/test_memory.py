"""A folder of ``memory=`` that others write to: nothing planted runs, hangs or is believed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sksoup import BestCheckpoint, SoupWarning
from sksoup.runtime.entries import MOST_BYTES, SUFFIX, pack, unpack
from sksoup.runtime.fingerprint import fingerprint

from ..zoo import Zoo, make_zoo


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return make_zoo(4, seed=0)


def entries(memory: Path) -> list[Path]:
    return sorted(memory.rglob(f"*{SUFFIX}"))


def assert_computed_anew(memory: Path, zoo: Zoo, n: int = 4):
    """The damaged ones are noticed, once, and the result is that without a memory."""
    plain = BestCheckpoint().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.warns(SoupWarning, match=r"An entry of memory= is damaged .*computed again"):
        found = BestCheckpoint(memory=memory).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert found.individual_scores_ == plain.individual_scores_
    assert found.counts_.n_forward == n


def test_exchanged_entries_are_not_believed(tmp_path, zoo: Zoo):
    BestCheckpoint(memory=tmp_path).fit(zoo.checkpoints, zoo.X, zoo.y)
    first, second, *_ = entries(tmp_path)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert_computed_anew(tmp_path, zoo, 2)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_no_pickle_is_run(tmp_path, zoo: Zoo):
    """Neither in the place of an entry nor anywhere else in the folder."""
    BestCheckpoint(memory=tmp_path / "memory").fit(zoo.checkpoints, zoo.X, zoo.y)
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    for path in entries(tmp_path / "memory"):
        path.write_bytes(payload)
        aside = path.with_suffix("")
        aside.mkdir()
        (aside / "output.pkl").write_bytes(payload)
    (tmp_path / "memory" / "joblib").mkdir()
    (tmp_path / "memory" / "joblib" / "output.pkl").write_bytes(payload)
    assert_computed_anew(tmp_path / "memory", zoo)
    assert not (tmp_path / "ran").exists()


def plant_pipe(path: Path):
    os.mkfifo(path)


def plant_endless(path: Path):
    path.symlink_to("/dev/zero")


def plant_huge(path: Path):
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk


def plant_promise(path: Path):
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def plant_nested(path: Path):
    header = b'{"__metadata__":' + b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


SCRIPT = """
import sys
from tests.attacks.test_memory import assert_computed_anew, make_zoo
from pathlib import Path
assert_computed_anew(Path(sys.argv[1]), make_zoo(6, seed=0), 6)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what is open can't be counted")
def test_folders_in_place_of_entries_leave_nothing_open(tmp_path, zoo: Zoo):
    soup = BestCheckpoint(memory=tmp_path).fit(zoo.checkpoints, zoo.X, zoo.y)
    for path in tmp_path.rglob(f"*{SUFFIX}"):
        path.unlink()
        path.mkdir()
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.warns(SoupWarning, match="memory="):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_hangs_or_exhausts_is_no_entry(tmp_path):
    zoo, memory = make_zoo(6, seed=0), tmp_path / "memory"
    BestCheckpoint(memory=memory).fit(zoo.checkpoints, zoo.X, zoo.y)
    plants = [plant_pipe, plant_endless, plant_huge, plant_promise, plant_nested, Path.mkdir]
    for path, plant in zip(entries(memory), plants, strict=True):
        path.unlink()
        plant(path)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, memory],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"tensor":"7"}',
        '{"dict":[[{"list":[]},1]]}',
        '{"dict":3}',
        "{}",
        '{"a":1,"b":2}',
        "[" * 9999,
    ],
)
def test_a_forged_entry_of_another_form_is_damaged(tmp_path, zoo: Zoo, text):
    BestCheckpoint(memory=tmp_path).fit(zoo.checkpoints, zoo.X, zoo.y)
    for path in entries(tmp_path):
        forged = {"value": text, "sha256": fingerprint(path.stem, text, {})}
        path.write_bytes(save({}, forged))
    assert_computed_anew(tmp_path, zoo)


def test_a_tensor_that_torch_can_not_hold_is_damaged(tmp_path, zoo: Zoo):
    BestCheckpoint(memory=tmp_path).fit(zoo.checkpoints, zoo.X, zoo.y)
    wrong = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": {"value": "1", "sha256": ""}, "0": wrong}).encode()
    for path in entries(tmp_path):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert_computed_anew(tmp_path, zoo)


def test_a_huge_header_is_not_parsed(monkeypatch):
    monkeypatch.setattr("sksoup.runtime.entries.json.loads", lambda text: pytest.fail("parsed"))
    data = b'{"__metadata__":{"value":"%s"}}' % bytes(100_000_000).replace(b"\0", b"a")
    with pytest.raises(ValueError, match=r"is not a whole entry: SafetensorError: .*too large"):
        unpack(len(data).to_bytes(8, "little") + data, "key")


def test_a_link_that_was_planted_is_replaced_and_its_target_kept(tmp_path, zoo: Zoo):
    memory, victim = tmp_path / "memory", tmp_path / "victim"
    BestCheckpoint(memory=memory).fit(zoo.checkpoints, zoo.X, zoo.y)
    victim.write_text("kept")
    for path in entries(memory):
        path.unlink()
        path.symlink_to(victim)
    assert_computed_anew(memory, zoo)
    assert victim.read_text() == "kept"
    assert not any(path.is_symlink() for path in entries(memory))


def test_an_entry_holds_no_code():
    with pytest.raises(TypeError, match="can't hold a Payload"):
        pack({"a": [torch.ones(1), Payload(Path())]}, "key")
