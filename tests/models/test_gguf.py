"""The header reader: what it reads, and that nothing unsound gets past it."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.errors import InvalidModelFileError, ModelNotFoundError
from edgellm.models.ggml_types import GGML_TYPES, REMOVED_TYPES
from edgellm.models.gguf import read_header
from edgellm.models.gguf_values import GGUFArray
from tests.models import raw_gguf as raw
from tests.models.raw_gguf import ARCHITECTURE, Raw, pair, tensor
from tests.support.tiny_gguf import write_tiny_llama


def tokens(*names: str) -> bytes:
    return pair("tokenizer.ggml.tokens", raw.ARRAY, (raw.STRING, names))


def test_reads_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", weights="q8_0", vocab=5000)
    header, reference = read_header(path), gguf.GGUFReader(str(path))
    assert header.version == 3
    assert header.alignment == 32
    assert header.data_offset == reference.data_offset
    assert header.file_bytes == path.stat().st_size
    found = [(t.name, t.dims, t.type.code, t.offset + header.data_offset, t.n_bytes) for t in header.tensors]
    expected = [
        (t.name, tuple(int(d) for d in t.shape), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in reference.tensors
    ]
    assert found == expected
    vocabulary = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(vocabulary, GGUFArray)
    assert (vocabulary.element_type, vocabulary.length) == ("string", 5000)
    for key, field in reference.fields.items():
        if (
            not key.startswith("GGUF.")
            and key != "tokenizer.ggml.tokens"
            and field.types[0] != gguf.GGUFValueType.ARRAY
        ):
            assert header.metadata[key] == field.contents()


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_value_type(tmp_path: Path, version: int) -> None:
    scalars = {
        raw.UINT8: 255, raw.INT8: -128, raw.UINT16: 65535, raw.INT16: -32768, raw.UINT32: 2**32 - 1,
        raw.INT32: -(2**31), raw.FLOAT32: 0.5, raw.BOOL: True, raw.STRING: "é", raw.UINT64: 2**64 - 1,
        raw.INT64: -(2**63), raw.FLOAT64: 1e300,
    }  # fmt: skip
    pairs = [ARCHITECTURE, *(pair(f"x.{code}", code, item) for code, item in scalars.items())]
    pairs += [pair(f"y.{code}", raw.ARRAY, (code, [item, item])) for code, item in scalars.items()]
    pairs.append(pair("y.empty", raw.ARRAY, (raw.STRING, [])))
    header = read_header(Raw(pairs=pairs, version=version).write(tmp_path / "a.gguf"))
    for code, item in scalars.items():
        assert header.metadata[f"x.{code}"] == item
        assert header.metadata[f"y.{code}"] == (item, item)
    assert header.metadata["y.empty"] == ()
    assert header.value_types["y.7"] == "bool[]"


def test_type_table_is_ggmls() -> None:
    import llama_cpp

    names = ("libggml-base.so", "libggml-base.dylib")
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder / name for name in names if (folder / name).exists())))
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_type_name.restype = ctypes.c_char_p
    for code, kind in GGML_TYPES.items():
        assert (kind.block_elements, kind.block_bytes) == (library.ggml_blck_size(code), library.ggml_type_size(code))
        assert kind.name.lower() == library.ggml_type_name(code).decode().lower()
    for code in REMOVED_TYPES:
        assert library.ggml_blck_size(code) == 0


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    whole = Raw(pairs=[ARCHITECTURE, tokens("a", "b"), pair("llama.block_count", raw.UINT32, 1)]).build()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    read_header(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidModelFileError, match=r"truncated|empty"):
            read_header(path)


HUGE = 2**64 - 1
REFUSED: dict[str, tuple[Raw, str]] = {
    "magic": (Raw(magic=b"GGUX"), "wrong magic"),
    "old format": (Raw(magic=b"tjgg"), "GGJT"),
    "zip": (Raw(magic=b"PK\x03\x04"), "ZIP"),
    "web page": (Raw(magic=b"<!DO"), "HTML"),
    "lfs": (Raw(magic=b"version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
    "version 0": (Raw(version=0), "version 0"),
    "version 1": (Raw(version=1), "version 1"),
    "version 4": (Raw(version=4), "version 4"),
    "big-endian": (Raw(version=3 << 24), "big-endian"),
    "too many keys": (Raw(n_pairs=HUGE), "keys, more than the limit"),
    "more keys than bytes": (Raw(n_pairs=60_000), "60000 keys do not fit"),
    "more keys than there are": (Raw(n_pairs=3), ""),
    "too many tensors": (Raw(n_tensors=2**63), "tensors, more than the limit"),
    "more tensors than bytes": (Raw(n_tensors=100_000), "100000 tensors do not fit"),
    "key length": (Raw(pairs=[struct.pack("<Q", HUGE) + bytes(64)]), "key 0 claims"),
    "key empty": (Raw(pairs=[ARCHITECTURE, pair("", raw.UINT8, 1)]), "key 1 is empty"),
    "key null byte": (Raw(pairs=[ARCHITECTURE, pair("a\0b", raw.UINT8, 1)]), "null byte"),
    "key encoding": (Raw(pairs=[ARCHITECTURE, pair(b"\xff\xfe", raw.UINT8, 1)]), "not UTF-8"),
    "duplicate key": (Raw(pairs=[ARCHITECTURE, ARCHITECTURE]), "duplicate key 'general.architecture'"),
    "string length": (Raw(pairs=[raw.string("k") + struct.pack("<IQ", raw.STRING, 1 << 40)]), "claims 1099511627776"),
    "value type": (Raw(pairs=[raw.string("k") + struct.pack("<IQ", 13, 0)]), "unknown value type 13"),
    "element type": (Raw(pairs=[raw.string("k") + struct.pack("<IIQ", raw.ARRAY, 99, 0)]), "unknown element type 99"),
    "nested array": (Raw(pairs=[raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.ARRAY, 1)]), "array of arrays"),
    "array length": (Raw(pairs=[raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.UINT8, HUGE)]), "do not fit"),
    "array overflow": (Raw(pairs=[raw.string("k") + struct.pack("<IIQ", raw.ARRAY, 10, 2**61 + 1)]), "do not fit"),
    "string in array": (
        Raw(pairs=[raw.string("k") + struct.pack("<IIQQ", raw.ARRAY, raw.STRING, 1, HUGE) + bytes(64)]),
        "string 0 of 'k' claims",
    ),
    "alignment 0": (Raw(pairs=[ARCHITECTURE, pair("general.alignment", raw.UINT32, 0)]), "not a power of two"),
    "alignment 24": (Raw(pairs=[ARCHITECTURE, pair("general.alignment", raw.UINT32, 24)]), "not a power of two"),
    "alignment 2**31": (Raw(pairs=[ARCHITECTURE, pair("general.alignment", raw.UINT32, 1 << 31)]), "power of two"),
    "alignment type": (Raw(pairs=[ARCHITECTURE, pair("general.alignment", raw.UINT64, 32)]), "must be uint32"),
    "tensor name long": (Raw(tensors=[tensor("a" * 64, (4, 2))]), "claims 64 bytes"),
    "tensor name empty": (Raw(tensors=[tensor("", (4, 2))]), "is empty"),
    "tensor name twice": (Raw(tensors=[tensor("a", (4, 2)), tensor("a", (4, 2), offset=32)]), "duplicate tensor name"),
    "five dimensions": (Raw(tensors=[tensor("a", (4, 2, 1, 1, 1))]), "5 dimensions"),
    "huge n_dims": (Raw(tensors=[raw.string("a") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "dimensions, more"),
    "zero dimension": (Raw(tensors=[tensor("a", (4, 0))]), "impossible dimensions"),
    "overflowing dimensions": (Raw(tensors=[tensor("a", (2**32, 2**32))]), "impossible dimensions"),
    "negative dimension": (Raw(tensors=[tensor("a", (HUGE, 1))]), "impossible dimensions"),
    "tensor type": (Raw(tensors=[tensor("a", (4, 2), code=43)]), "type 43: unknown"),
    "removed type": (Raw(tensors=[tensor("a", (32, 1), code=31)]), "Q4_0_4_4, which llama.cpp no longer reads"),
    "row size": (Raw(tensors=[tensor("a", (48, 2), code=8)]), "48 elements, not a multiple of Q8_0's 32"),
    "offset misaligned": (Raw(tensors=[tensor("a", (4, 2), offset=8)]), "not a multiple of 32"),
    "gap": (Raw(tensors=[tensor("a", (4, 2), offset=32)], data=bytes(64)), "expected 0"),
    "overlap": (Raw(tensors=[tensor("a", (4, 4)), tensor("b", (4, 2), offset=32)], data=bytes(96)), "overlaps"),
    "past the end": (Raw(tensors=[tensor("a", (4, 3))]), "ends at byte"),
    "far past the end": (Raw(tensors=[tensor("a", (2**40, 2**20))]), "ends at byte"),
    "offset overflow": (Raw(tensors=[tensor("a", (4, 2)), tensor("b", (4, 2), offset=2**64 - 32)]), "expected 32"),
    "no architecture": (Raw(pairs=[]), "general.architecture is missing"),
    "architecture type": (Raw(pairs=[pair("general.architecture", raw.UINT32, 1)]), "must be string"),
    "tokens type": (
        Raw(pairs=[ARCHITECTURE, pair("tokenizer.ggml.tokens", raw.ARRAY, (raw.INT32, [1]))]),
        "tokens must be string",
    ),
    "token types short": (
        Raw(pairs=[ARCHITECTURE, tokens("a", "b"), pair("tokenizer.ggml.token_type", raw.ARRAY, (raw.INT32, [1]))]),
        "only 1 entries for 2 tokens",
    ),
    "token twice": (Raw(pairs=[ARCHITECTURE, tokens("a", "b", "a")]), "token 2 b'a' stands twice"),
    "token twice for C": (Raw(pairs=[ARCHITECTURE, tokens("a\0x", "a\0y")]), "token 1 b'a' stands twice"),
    "empty token's new name": (Raw(pairs=[ARCHITECTURE, tokens("", "[EMPTY_0]")]), "stands twice"),
    "no layers": (Raw(pairs=[ARCHITECTURE, pair("llama.block_count", raw.UINT32, 0)]), "block_count must be 1 to 512"),
    "many layers": (Raw(pairs=[ARCHITECTURE, pair("llama.block_count", raw.UINT32, 513)]), "block_count must be"),
    "layers as text": (Raw(pairs=[ARCHITECTURE, pair("llama.block_count", raw.STRING, "2")]), "block_count must be"),
    "experts": (Raw(pairs=[ARCHITECTURE, pair("llama.expert_count", raw.UINT32, 1025)]), "expert_count must be"),
    "experts used": (Raw(pairs=[ARCHITECTURE, pair("llama.expert_count", raw.UINT32, 8)]), "0 of 8 experts"),
    "used without experts": (Raw(pairs=[ARCHITECTURE, pair("llama.expert_used_count", raw.UINT32, 2)]), "do not go"),
    "rope scaling": (Raw(pairs=[ARCHITECTURE, pair("llama.rope.scaling.type", raw.STRING, "zig")]), "'zig' is unknown"),
    "heads": (
        Raw(
            pairs=[
                ARCHITECTURE,
                pair("llama.block_count", raw.UINT32, 2),
                pair("llama.attention.head_count_kv", raw.ARRAY, (raw.UINT32, [2, 2, 2])),
            ]
        ),
        "3 entries for 2 layers",
    ),
    "rotary width": (
        Raw(
            pairs=[
                ARCHITECTURE,
                pair("llama.embedding_length", raw.UINT32, 64),
                pair("llama.attention.head_count", raw.UINT32, 4),
                pair("llama.rope.dimension_count", raw.UINT32, 8),
            ]
        ),
        "differ in width: 16, 16, 8",
    ),
    "context as text": (Raw(pairs=[ARCHITECTURE, pair("llama.context_length", raw.STRING, "9")]), "must be an integer"),
    "adapter alpha": (Raw(pairs=[ARCHITECTURE, pair("adapter.lora.alpha", raw.UINT32, 1)]), "must be float32"),
    "split number": (
        Raw(pairs=[ARCHITECTURE, pair("split.no", raw.UINT16, 2), pair("split.count", raw.UINT16, 2)]),
        "split.no is 2 of 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_refuses(tmp_path: Path, case: str) -> None:
    faulty, message = REFUSED[case]
    with pytest.raises(InvalidModelFileError) as caught:
        read_header(faulty.write(tmp_path / "faulty.gguf"))
    assert message in str(caught.value)
    assert "faulty.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_accepts_what_llama_cpp_accepts(tmp_path: Path) -> None:
    sound = {
        "no tensors": Raw(tensors=[], data=b"", alignment=1),
        "alignment 64": Raw(pairs=[ARCHITECTURE, pair("general.alignment", raw.UINT32, 64)], alignment=64),
        "scalar tensor": Raw(tensors=[tensor("a", ())]),
        "unpadded end": Raw(tensors=[tensor("a", (1,))], data=bytes(4)),
        "bytes after the end": Raw(data=bytes(100)),
        "empty tokens": Raw(pairs=[ARCHITECTURE, tokens("", "", "a")]),
        "bad text": Raw(pairs=[ARCHITECTURE, pair("general.author", raw.STRING, b"\xff")]),
        "adapter without layers": Raw(
            pairs=[ARCHITECTURE, pair("general.type", raw.STRING, "adapter"), pair("llama.block_count", raw.UINT32, 0)]
        ),
    }
    for name, file in sound.items():
        assert read_header(file.write(tmp_path / "sound.gguf")).version == 3, name


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(InvalidModelFileError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(InvalidModelFileError, match="cannot be read"):
        read_header("a\0b")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidModelFileError, match="not a regular file"):
        read_header(tmp_path / "pipe.gguf")


def test_a_huge_sparse_file_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    head = Raw(pairs=[raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.UINT8, 1 << 40)], tensors=[], data=b"")
    path.write_bytes(head.build())
    os.truncate(path, 1 << 41)
    with pytest.raises(InvalidModelFileError, match="header is larger than 256 MiB"):
        read_header(path)


TINY = Raw(
    pairs=[
        ARCHITECTURE,
        pair("general.alignment", raw.UINT32, 32),
        tokens("a", "b", "c"),
        pair("tokenizer.ggml.scores", raw.ARRAY, (raw.FLOAT32, [0.0, 1.0, 2.0])),
        pair("llama.block_count", raw.UINT32, 2),
        pair("llama.attention.head_count_kv", raw.ARRAY, (raw.UINT32, [1, 2])),
    ],
    tensors=[tensor("a", (4, 2)), tensor("b", (32, 1), code=8, offset=32)],
    data=bytes(96),
).build()


def _consistent(path: Path) -> None:
    """Reads, or refuses with the one right error; what was read lies inside the file."""
    try:
        header = read_header(path)
    except InvalidModelFileError:
        return
    for item in header.tensors:
        assert 0 <= header.data_offset + item.offset <= header.file_bytes - item.n_bytes


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    cut=st.integers(0, len(TINY)) | st.none(),
)
def test_any_edit_is_read_or_refused(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int | None) -> None:
    data = bytearray(TINY)
    for position, patch in edits:
        data[position : position + len(patch)] = patch
    path = tmp_path / "edited.gguf"
    path.write_bytes(bytes(data[:cut]))
    _consistent(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=300), tensors=st.integers(0, 3), pairs=st.integers(0, 5))
def test_any_bytes_are_read_or_refused(tmp_path: Path, tail: bytes, tensors: int, pairs: int) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + tail)
    _consistent(path)
