from __future__ import annotations

import pytest

from sksoup import GreedySoup, MEHLSoup, UniformSoup
from sksoup.inspection import compare_soups, paper_systems

from .zoo import Zoo


def test_compares_all_ten_systems(zoo: Zoo, tmp_path):
    checkpoints = zoo.checkpoints.save(tmp_path / "zoo")
    seen = []
    comparison = compare_soups(
        checkpoints, zoo.X, zoo.y, zoo.X[:30], zoo.y[:30], on_result=seen.append
    )
    assert [r.system for r in comparison.results] == list(paper_systems(7))
    assert tuple(seen) == comparison.results
    for result in comparison.results:
        soup = comparison.soups[result.system]
        assert result.held_out == soup.score(zoo.X, zoo.y)
        assert result.test == soup.score(zoo.X[:30], zoo.y[:30])
        assert result.seconds > 0
    by_name = {r.system: r for r in comparison.results}
    assert by_name["Best checkpoint"].n_ingredients == 1
    assert by_name["Uniform-Soup"].forward_passes == 0
    assert 7 < by_name["Greedy-Soup"].forward_passes < 14  # chunks of 32 of 60 rows
    assert by_name["HL-Soup"].backward_passes == 5
    assert by_name["MEHL-Soup"].backward_passes == 20  # 4 model batches of 5 epochs
    assert by_name["Learned-Soup"].extra_memory > by_name["MEHL-Soup"].extra_memory + 3
    table = str(comparison).splitlines()
    assert len(table) == 12
    assert len(set(map(len, table[2:]))) == 1
    assert comparison.to_markdown().count("\n") == 11


def test_any_systems_and_no_test_rows(zoo: Zoo):
    comparison = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, systems={"a": UniformSoup(), "b": GreedySoup()}
    )
    assert [r.system for r in comparison.results] == ["a", "b"]
    assert comparison.results[0].test is None
    assert " - " in str(comparison)


def test_memory_does_not_depend_on_where_the_checkpoints_live(zoo: Zoo, tmp_path):
    systems = {"mehl": MEHLSoup(model_batch_size=2, random_state=0)}
    files = zoo.checkpoints.save(tmp_path / "zoo")
    memory, disk = (
        compare_soups(c, zoo.X, zoo.y, systems=systems).results[0].extra_memory
        for c in (zoo.checkpoints, files)
    )
    assert memory == pytest.approx(disk, abs=2)  # tiny nets: a few hundred bytes are a model


def test_bad_arguments(zoo: Zoo):
    with pytest.raises(TypeError, match="expected a CheckpointCollection"):
        compare_soups([], zoo.X, zoo.y)
    with pytest.raises(ValueError, match="both X_test and y_test"):
        compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X)
