"""Entries of the cache: what goes in comes out, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sksoup.runtime.entries import pack, read_entry, unpack, write_entry
from sksoup.runtime.fingerprint import fingerprint

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([torch.float64, torch.bfloat16, torch.uint8, torch.bool]).map(
        lambda dtype: torch.arange(6).reshape(2, 3).to(dtype).T
    )
    | st.just(torch.tensor(2.5))
    | st.just(torch.empty(0, 3))
)  # fmt: skip
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


@given(value=VALUES, key=st.text())
def test_any_value_comes_back(value, key):
    data = pack(value, key)
    assert fingerprint(unpack(data, key)) == fingerprint(value)  # types and bits, NaN included
    with pytest.raises(ValueError, match="another key"):
        unpack(data, key + "2")


@given(value=VALUES, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_changed_bit_is_believed(value, where, bit):
    data = bytearray(pack(value, "key"))
    data[int(where * len(data))] ^= 1 << bit
    try:
        found = unpack(bytes(data), "key")
    except ValueError:
        return
    assert fingerprint(found) == fingerprint(value)  # a space of the padding, say


def test_numbers_of_numpy_become_pythons():
    found = unpack(pack({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}, "k"), "k")
    assert found == {"a": 0.5, "b": 3, "c": True}
    assert [type(one) for one in found.values()] == [float, int, bool]


def test_tensors_that_share_memory_are_kept_apart():
    base = torch.arange(4.0)
    a, b = unpack(pack([base, base[1:3]], "k"), "k")
    a[0] = 7
    assert torch.equal(a, torch.tensor([7.0, 1, 2, 3]))
    assert torch.equal(b, base[1:3])


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "entry").mkdir()
    with pytest.raises(OSError, match="entry"):
        write_entry(tmp_path / "entry", b"some")
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    write_entry(tmp_path / "other", b"some")
    assert read_entry(tmp_path / "other") == b"some"
