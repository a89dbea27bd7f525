"""Expert packs: what is packed is what was there, and a pack is served like the model that it was made of."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.backend.model import Model
from edgellm.errors import InvalidModelFileError, ModelUnsupportedError, PackError
from edgellm.models.describe import describe
from edgellm.models.gguf import read_header
from edgellm.models.packs import (
    DIMS_KEY,
    NAMES_KEY,
    TYPES_KEY,
    VERSION_KEY,
    WIDTHS_KEY,
    is_pack,
    model_tensors,
)
from edgellm.moe.layout import read_layout
from edgellm.moe.pack import check_packable, write_pack
from edgellm.moe.pager import load_paged
from tests.moe.test_paging import budgets, layout_of, run
from tests.support.moe_traits import ARCHITECTURES
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_moe import write_tiny_moe


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss", "deepseek2", "llama", "granitemoe"])
def test_a_lossless_pack_computes_the_same(architecture: str, tmp_path: Path) -> None:
    assert architecture in ARCHITECTURES
    path = write_tiny_moe(tmp_path / "model.gguf", architecture, weights="q4_k")
    pack = tmp_path / "pack.gguf"
    assert write_pack(path, pack) == pack.stat().st_size
    expected = run(load_paged(layout_of(path), layout_of(path).whole_bytes, tmp_path))
    layout = layout_of(pack)
    for budget in budgets(layout):
        assert np.array_equal(run(load_paged(layout, budget, tmp_path)), expected)


def test_an_experts_matrices_are_read_at_once(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights="q8_0")
    pack = tmp_path / "pack.gguf"
    write_pack(path, pack)
    for file, reads in ((path, 6), (pack, 2)):
        model = load_paged(layout_of(file), layout_of(file).whole_bytes, tmp_path)
        store = model.experts
        assert store is not None
        for piece in layout_of(file).slices[:3]:
            assert [expert for expert, _ in store.native.fetch(piece.name, [1, 5])] == [1, 5]
        assert store.stats.reads == reads
        model.close()


def test_a_pack_is_described_as_the_model(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "olmoe", weights="q4_0")
    write_pack(path, tmp_path / "pack.gguf")
    model, pack = describe(path), describe(tmp_path / "pack.gguf")
    for name in ("architecture", "parameters", "tensor_bytes", "expert_bytes", "matrix_bytes", "experts", "layers"):
        assert getattr(model, name) == getattr(pack, name)
    assert (model.packed, pack.packed) == (False, True)
    before, after = read_header(path), read_header(tmp_path / "pack.gguf")
    assert sorted(tensor.name for tensor in model_tensors(after)) == sorted(tensor.name for tensor in before.tensors)
    for key, value in before.metadata.items():
        if before.value_types[key] != "string[]":
            assert after.metadata[key] == value or key == "general.alignment"


@pytest.mark.parametrize(("weights", "width"), [("q4_k", 3), ("q4_0", 2), ("q8_0", 5), ("q6_k", 4)])
def test_narrow_experts_compute_what_their_trial_promised(weights: str, width: int, tmp_path: Path) -> None:
    """An expert that is narrow in the file, and one that is narrowed and widened when it is read, are the same."""
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights=weights)
    layout = layout_of(path)
    widths = np.zeros((layout.layers, layout.experts), np.uint8)
    widths[:, ::2] = width
    write_pack(path, tmp_path / "pack.gguf", widths=widths)
    narrow = layout_of(tmp_path / "pack.gguf")
    assert narrow.all_read_bytes < layout.all_read_bytes
    expected = run(load_paged(layout, layout.whole_bytes, tmp_path, trial_widths=widths))
    assert not np.array_equal(expected, run(load_paged(layout, layout.whole_bytes, tmp_path)))
    for budget in budgets(narrow):
        assert np.array_equal(run(load_paged(narrow, budget, tmp_path)), expected)
    unpacked = read_layout(tmp_path / "pack.gguf", packed=False)
    assert unpacked is not None
    plain = layout_of(path, packed=False)
    expected = run(load_paged(plain, plain.whole_bytes, tmp_path, packed=False, trial_widths=widths))
    for budget in budgets(unpacked):
        assert np.array_equal(run(load_paged(unpacked, budget, tmp_path, packed=False)), expected)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupportedError, match="no stacked expert tensors"):
        write_pack(write_tiny_llama(tmp_path / "dense.gguf"), tmp_path / "pack.gguf")
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    write_pack(path, tmp_path / "pack.gguf")
    with pytest.raises(PackError, match="is there already"):
        write_pack(path, tmp_path / "pack.gguf")
    with pytest.raises(ModelUnsupportedError, match="already"):
        write_pack(tmp_path / "pack.gguf", tmp_path / "again.gguf")
    for place in (tmp_path / "nowhere" / "pack.gguf", path / "pack.gguf"):
        for attempt in (write_pack, check_packable):
            with pytest.raises(PackError, match="cannot be written"):
                attempt(path, place)
    assert sorted(file.name for file in tmp_path.glob("*")) == ["dense.gguf", "model.gguf", "pack.gguf"]


def test_damaged_packs_are_refused(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights="q4_0")
    pack = tmp_path / "pack.gguf"
    write_pack(path, pack)
    raw, header = pack.read_bytes(), read_header(pack)
    assert is_pack(header)

    def spoiled(key: str, value: bytes) -> None:
        end = header.places[key][1]
        pack.write_bytes(raw[: end - len(value)] + value + raw[end:])

    spoiled("edgellm.pack.version", b"\2\0\0\0")
    with pytest.raises(ModelUnsupportedError, match="version 2"):
        read_layout(pack)
    spoiled("edgellm.pack.widths", b"\x02")  # its block is longer than it would be then
    with pytest.raises(InvalidModelFileError, match="bytes, not"):
        read_layout(pack)
    spoiled("edgellm.pack.dims", b"\0" * 8)
    with pytest.raises(InvalidModelFileError, match="cannot have been packed"):
        read_layout(pack)
    spoiled("edgellm.pack.types", b"\x63\0\0\0")
    with pytest.raises(InvalidModelFileError, match="cannot have been packed"):
        describe(pack)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_a_pack_says_of_itself_is_not_trusted(pack: Path, data: st.DataObject) -> None:
    """Any bytes in its keys: it is read, or refused in our own words."""
    raw, header = pack.read_bytes(), read_header(pack)
    key = data.draw(st.sampled_from([DIMS_KEY, TYPES_KEY, WIDTHS_KEY, NAMES_KEY, VERSION_KEY]))
    start, end = header.places[key]
    start += 8 + len(key) + 4 + (12 if key != VERSION_KEY else 0)
    values = data.draw(st.lists(st.tuples(st.integers(start, end - 1), st.integers(0, 255)), min_size=1, max_size=6))
    changed = bytearray(raw)
    for place, value in values:
        changed[place] = value
    spoiled = pack.with_name("spoiled.gguf")
    spoiled.write_bytes(changed)
    with contextlib.suppress(InvalidModelFileError, ModelUnsupportedError):
        describe(spoiled)
        read_layout(spoiled)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    path = write_tiny_moe(folder / "model.gguf", "qwen3moe", weights="q4_0")
    write_pack(path, folder / "pack.gguf")
    return folder / "pack.gguf"


def test_blocks_named_in_two_ways_are_refused(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe", weights="q4_0")
    write_pack(path, tmp_path / "pack.gguf")
    raw = (tmp_path / "pack.gguf").read_bytes()
    changed = raw.replace(b"blk.0.ffn_gate_exps.weight", b"blk.00.ffn_up_exps.weight0"[:26], 1)
    (tmp_path / "pack.gguf").write_bytes(changed)
    with pytest.raises(InvalidModelFileError):
        read_layout(tmp_path / "pack.gguf")


def test_llama_cpp_itself_refuses_a_pack(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "model.gguf", "qwen3moe")
    write_pack(path, tmp_path / "pack.gguf")
    with pytest.raises(Exception, match="could not load"):
        Model(tmp_path / "pack.gguf")
