"""Experts found in files, and budgets split."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgellm.errors import ModelTooLargeError, ModelUnsupportedError
from edgellm.models.gguf import read_header
from edgellm.moe.layout import ExpertLayout, plan_experts, read_layout
from edgellm.moe.pager import load_paged
from tests.moe.test_paging import run
from tests.support.rewrite import rewrite
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_moe import write_tiny_moe


def layout_of(path: Path) -> ExpertLayout:
    layout = read_layout(path)
    assert layout is not None
    return layout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_moe(tmp_path / "moe.gguf", "deepseek", experts=8)


def test_what_is_found(path: Path) -> None:
    layout = layout_of(path)
    assert layout.blocks == (1, 2, 3)[: layout.layers]  # the first is dense
    assert (layout.experts, layout.experts_used) == (8, 2)
    assert [piece.name for piece in layout.slices[:3]] == [
        f"blk.1.ffn_{part}_exps.weight" for part in ("up", "gate", "down")
    ]
    header = read_header(path)
    stacked = [tensor for tensor in header.tensors if "_exps.weight" in tensor.name]
    assert layout.all_read_bytes == sum(tensor.n_bytes for tensor in stacked)
    for piece in layout.slices:
        (tensor,) = [tensor for tensor in stacked if tensor.name == piece.name]
        assert piece.offset == header.data_offset + tensor.offset
        assert piece.n_bytes * 8 == tensor.n_bytes


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    assert read_layout(write_tiny_llama(tmp_path / "dense.gguf")) is None


def test_separate_experts_are_refused(tmp_path: Path) -> None:
    stacked = write_tiny_llama(tmp_path / "new.gguf", experts=4)
    with pytest.raises(ModelUnsupportedError, match=r"stacked.*Convert the model anew"):
        read_layout(rewrite(stacked, tmp_path / "old.gguf", separate=True))


def test_as_many_experts_as_the_file_says(path: Path, tmp_path: Path) -> None:
    wrong = rewrite(path, tmp_path / "wrong.gguf", values={"deepseek.expert_count": 9})
    with pytest.raises(ModelUnsupportedError, match="8 experts in a layer, but it says 9"):
        read_layout(wrong)
    nothing = {"deepseek.expert_count": 0, "deepseek.expert_used_count": 0}
    assert layout_of(rewrite(path, tmp_path / "silent.gguf", values=nothing)).experts == 8


def test_different_sizes_lie_in_different_pools(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe", weights="q8_0")
    reader = gguf.GGUFReader(str(path))
    out = gguf.GGUFWriter(str(tmp_path / "mixed.gguf"), "qwen3moe")
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_down_exps.weight":
            whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            out.add_tensor(tensor.name, whole)
        else:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    layout = layout_of(tmp_path / "mixed.gguf")
    assert layout.pools[0] == layout.pools[2] != layout.pools[1]
    plan = plan_experts(layout, layout.least_bytes + (layout.whole_bytes - layout.least_bytes) // 2)
    assert plan.slots[layout.pools[0]] // 2 == pytest.approx(plan.slots[layout.pools[1]], abs=1)


def test_a_budget_is_kept(path: Path) -> None:
    layout = layout_of(path)
    for budget in range(layout.least_bytes, layout.whole_bytes + 10_000, 7_777):
        plan = plan_experts(layout, budget)
        held = sum(slots * size for slots, size in zip(plan.slots, layout.slot_bytes, strict=True))
        whole = budget >= layout.whole_bytes
        assert held + layout.reading_bytes + (0 if whole else plan.stream_bytes) <= budget
        assert whole == (sum(plan.slots) == layout.layers * layout.experts)
    with pytest.raises(ModelTooLargeError) as found:
        plan_experts(layout, layout.least_bytes - 1)
    assert found.value.needed_bytes == layout.least_bytes


def test_a_split_model(path: Path, tmp_path: Path) -> None:
    """Experts on both sides of the border."""
    parts = _split(path, tmp_path / "split")
    whole, split = layout_of(path), layout_of(parts[0])
    assert {piece.file for piece in split.slices} == {0, 1}
    logits = run(load_paged(whole, whole.least_bytes, tmp_path / "home"))
    assert np.array_equal(run(load_paged(split, split.least_bytes, tmp_path / "home")), logits)


def test_a_split_model_by_way_of_links(path: Path, tmp_path: Path) -> None:
    """As a cache keeps them: the files have names of their own, and links the names of the parts."""
    parts = _split(path, tmp_path / "split")
    links = tmp_path / "links"
    links.mkdir()
    for number, part in enumerate(parts):
        blob = part.rename(tmp_path / f"blob{number}")
        (links / part.name).symlink_to(blob)
    split = layout_of(links / parts[0].name)
    assert split.name == parts[0].name
    whole = layout_of(path)
    logits = run(load_paged(whole, whole.least_bytes, tmp_path / "home"))
    assert np.array_equal(run(load_paged(split, split.least_bytes, tmp_path / "home")), logits)


def _split(path: Path, folder: Path) -> list[Path]:
    """Two files, as llama-gguf-split writes them."""
    folder.mkdir()
    reader = gguf.GGUFReader(str(path))
    half = [index for index, t in enumerate(reader.tensors) if "_exps" in t.name][4]
    paths = []
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        paths.append(folder / f"moe-{number + 1:05d}-of-00002.gguf")
        out = gguf.GGUFWriter(str(paths[-1]), str(reader.fields["general.architecture"].contents()))
        for field in reader.fields.values():
            if number == 0 and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                out.add_key_value(field.name, field.contents(), kind, sub)
        out.add_uint16("split.no", number)
        out.add_uint16("split.count", 2)
        out.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return paths
