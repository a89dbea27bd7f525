"""Routing profiles, what is made of them, and the arrays in files that they are kept in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from edgellm.moe.arrays import read_array, write_array
from edgellm.moe.layout import ExpertLayout, read_layout
from edgellm.moe.profile import expected_hit_rate, hottest, read_profile, write_profile
from tests.support.tiny_moe import write_tiny_moe


@pytest.fixture
def layout(tmp_path: Path) -> ExpertLayout:
    found = read_layout(write_tiny_moe(tmp_path / "moe.gguf", "deepseek", experts=8))
    assert found is not None
    return found


def test_profiles(layout: ExpertLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "routing.npy"
    nothing = read_profile(file, layout)
    assert nothing.shape == (layout.layers, layout.experts)
    assert expected_hit_rate(nothing, layout, [4]) is None
    counts = nothing.copy()
    counts[0, 3], counts[1, 1], counts[1, 7] = 5, 4, 1
    write_profile(file, counts)
    assert np.array_equal(read_profile(file, layout), counts)
    assert hottest(counts, layout, [2])[:2] == [[3], [1]]
    assert expected_hit_rate(counts, layout, [2]) == 0.9
    for damage in (b"", b"x" * 100, file.read_bytes()[:90]):
        file.write_bytes(damage)
        assert not read_profile(file, layout).any()
        assert "routing.npy" in caplog.text
        caplog.clear()
    np.save(file, np.zeros((1, 1), np.uint64))
    assert not read_profile(file, layout).any()
    assert "another model" in caplog.text
    write_profile(tmp_path / "routing.npy" / "below", counts)
    assert "cannot be written" in caplog.text


def test_slots_are_filled_with_what_was_needed(layout: ExpertLayout) -> None:
    counts = np.zeros((layout.layers, layout.experts), np.uint64)
    every = layout.layers * layout.experts
    assert hottest(counts, layout, [every - 1]) == [[] for _ in range(layout.layers)]
    assert hottest(counts, layout, [every]) == [list(range(layout.experts))] * layout.layers
    counts[-1, 2] = 1
    assert hottest(counts, layout, [every - 1]) == [*[[] for _ in range(layout.layers - 1)], [2]]
    assert hottest(counts, layout, [every])[-1][:2] == [2, 0]


def test_the_folder_of_a_removed_copy_stays_away(layout: ExpertLayout, tmp_path: Path) -> None:
    counts = np.ones((layout.layers, layout.experts), np.uint64)
    write_profile(tmp_path / "removed" / "routing.npy", counts)
    assert not (tmp_path / "removed").exists()
    with pytest.raises(FileNotFoundError):
        write_array(tmp_path / "removed" / "checksums.npy", counts)
    assert not (tmp_path / "removed").exists()


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _claiming(elements: int) -> bytes:
    """The header of an array of so many elements, and eight of them."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u8", "fortran_order": False, "shape": (elements,)})
    return buffer.getvalue() + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        _claiming(1 << 50),
        _saved(np.arange(8, dtype=np.uint64)) + b"x",
        _saved(np.arange(8, dtype=np.uint64))[:-1],
        _saved(np.arange(8, dtype=np.int64)),
        _saved(np.arange(9, dtype=np.uint64)),
        _saved(np.array([{}, []], dtype=object)),
        b"PK\x03\x04 but no archive",
        b"\x93NUMPY\x02\x00" + bytes(64),
    ],
    ids=["huge", "longer", "shorter", "signed", "nine", "objects", "archive", "version 2"],
)
def test_an_array_is_read_if_it_is_the_one_expected(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "array.npy"
    path.write_bytes(content)
    assert read_array(path, (8,), np.uint64) is None
    assert "begun anew" in caplog.text
    write_array(path, np.arange(8, dtype=np.uint64))
    found = read_array(path, (8,), np.uint64)
    assert found is not None
    assert np.array_equal(found, np.arange(8))
