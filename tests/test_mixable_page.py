"""The program on the page "Train checkpoints that can be mixed" runs as it stands."""

from __future__ import annotations

from .pages import run


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("mixable")
    assert len(found["ckpts"]) == 4
    assert found["ckpts"].healthy().names == found["ckpts"].names  # and no warning
    assert found["soup"].score(found["X_test"], found["y_test"]) > 0.85
