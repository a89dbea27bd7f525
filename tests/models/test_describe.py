"""describe() and split models, on files of several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.errors import InvalidModelFileError
from edgellm.models.describe import StateShape, describe
from edgellm.models.gguf import read_header
from edgellm.models.split import model_stem, split_names, split_paths
from tests.models import raw_gguf as raw
from tests.models.raw_gguf import ARCHITECTURE, Raw, pair, tensor
from tests.support.gguf_writer import CHATML
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_llama, write_tiny_lora, write_tiny_mamba


def test_decoder(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "a.gguf", architecture="qwen2", layers=3, weights="q8_0", vocab=1000)
    info = describe(path)
    assert info == describe(read_header(path))
    assert (info.architecture, info.name, info.quantisation, info.licence) == (
        "qwen2",
        "Tiny qwen2",
        "Q8_0",
        "apache-2.0",
    )
    assert (info.layers, info.embedding_width, info.heads, info.kv_heads) == (3, 64, 4, (2, 2, 2))
    assert (info.key_width, info.value_width, info.context_tokens, info.vocabulary) == (16, 16, 512, 1000)
    assert (info.tokenizer, info.chat_template, info.named_templates) == ("bpe", CHATML, {})
    assert info.parameters == 2 * 1000 * 64 + 64 + 3 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 128 + 3 * 64 * 128)
    assert info.file_bytes == path.stat().st_size
    assert info.files == (path,)
    assert (info.is_adapter, info.is_embedding, info.recurrent) == (False, False, False)


def test_mixture_of_experts(tmp_path: Path) -> None:
    info = describe(write_tiny_llama(tmp_path / "a.gguf", architecture="qwen3moe", experts=4, experts_used=2))
    assert (info.experts, info.experts_used) == (4, 2)


def test_recurrent(tmp_path: Path) -> None:
    info = describe(write_tiny_mamba(tmp_path / "a.gguf"))
    assert info.recurrent
    assert info.state == StateShape(layers=2, conv_elements=3 * 128, state_elements=16 * 128)
    assert info.kv_heads == (0, 0)


def test_embedding_model(tmp_path: Path) -> None:
    info = describe(write_tiny_bert(tmp_path / "a.gguf"))
    assert (info.pooling, info.causal, info.is_embedding, info.tokenizer) == ("mean", False, True, "wordpiece")
    assert info.chat_template is None


def test_adapter(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf")
    info = describe(write_tiny_lora(tmp_path / "lora.gguf", base, rank=8, alpha=16.0))
    assert info.is_adapter
    assert info.adapter is not None
    assert (info.architecture, info.adapter.kind, info.adapter.rank, info.adapter.alpha) == ("llama", "lora", 8, 16.0)


def test_named_templates_and_heads_by_layer(tmp_path: Path) -> None:
    pairs = [
        ARCHITECTURE,
        pair("tokenizer.chat_template", raw.STRING, "plain"),
        pair("tokenizer.chat_template.tool_use", raw.STRING, "tools"),
        pair("tokenizer.chat_templates", raw.ARRAY, (raw.STRING, ["tool_use"])),
        pair("llama.block_count", raw.UINT32, 3),
        pair("llama.embedding_length", raw.UINT32, 64),
        pair("llama.attention.head_count", raw.ARRAY, (raw.UINT32, [4, 8, 8])),
        pair("llama.attention.head_count_kv", raw.ARRAY, (raw.INT32, [0, 2, 4])),
    ]
    info = describe(Raw(pairs=pairs).write(tmp_path / "a.gguf"))
    assert info.named_templates == {"tool_use": "tools"}
    assert (info.heads, info.kv_heads, info.key_width) == (8, (0, 2, 4), 8)
    assert info.quantisation == "F32"  # no general.file_type: what most bytes are
    assert info.name == "a"


def write_split(folder: Path, count: int = 3, total: int | None = None, repeat: bool = False) -> list[Path]:
    paths = []
    for number in range(count):
        pairs = [pair("split.no", raw.UINT16, number), pair("split.count", raw.UINT16, count)]
        if number == 0:
            pairs += [ARCHITECTURE, pair("split.tensors.count", raw.INT32, count if total is None else total)]
        name = "t0" if repeat else f"t{number}"
        part = Raw(pairs=pairs, tensors=[tensor(name, (4, 2))])
        paths.append(part.write(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_split_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert split_paths(paths[0]) == tuple(paths)
    info = describe(paths[0])
    assert info.files == tuple(paths)
    assert info.parameters == 24
    assert info.file_bytes == sum(path.stat().st_size for path in paths)


def test_split_names() -> None:
    assert split_names("d/m-00002-of-00003.gguf") == tuple(f"d/m-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert split_names("m.gguf") == ("m.gguf",)
    assert split_names("m-00001-of-99999.gguf") == ("m-00001-of-99999.gguf",)
    assert model_stem("m-00001-of-00003.gguf") == "m"
    assert model_stem("SmolLM2-135M.Q4_1.gguf") == "SmolLM2-135M.Q4_1"


def test_split_parts_are_checked(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    with pytest.raises(InvalidModelFileError, match=r"later part .* name the first part, m-00001-of-00003\.gguf"):
        describe(paths[1])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(InvalidModelFileError, match="is not part 3 of 3"):
        describe(paths[0])
    paths[2].write_bytes(b"GGUF")
    with pytest.raises(InvalidModelFileError, match="truncated"):
        describe(paths[0])
    paths[2].unlink()
    with pytest.raises(InvalidModelFileError, match=r"part 3 of 3 is missing: m-00003-of-00003\.gguf"):
        describe(paths[0])
    with pytest.raises(InvalidModelFileError, match="must end in -00001-of-00003"):
        describe(paths[0].rename(tmp_path / "renamed.gguf"))
    with pytest.raises(InvalidModelFileError, match="hold 3 tensors, expected 5"):
        describe(write_split(tmp_path, total=5)[0])
    with pytest.raises(InvalidModelFileError, match="'t0' stands in more than one part"):
        describe(write_split(tmp_path, repeat=True)[0])
