"""What the trainer reads from headers, and what it refuses. Needs no torch."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import InvalidModelFileError, ModelError, ModelUnsupportedError
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.tune.architecture import ARCHITECTURES, matrix_shape, read_architecture
from tests.support.tiny_gguf import GEMMA_WINDOW, write_tiny_llama


class _Headers(dict[str, GGUFHeader]):
    def __repr__(self) -> str:
        return "headers"  # hypothesis shows arguments, and refuses long ones


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFHeader]:
    folder = tmp_path_factory.mktemp("architecture")
    paths = {name: write_tiny_llama(folder / f"{name}.gguf", architecture=name, layers=7) for name in ARCHITECTURES}
    return _Headers({name: read_header(path) for name, path in paths.items()})


def _with(header: GGUFHeader, **values: object) -> GGUFHeader:
    name = header.metadata["general.architecture"]
    return dataclasses.replace(
        header, metadata={**header.metadata, **{f"{name}.{key.replace('__', '.')}": one for key, one in values.items()}}
    )


def test_what_is_read(headers: dict[str, GGUFHeader]) -> None:
    llama, gemma = read_architecture([headers["llama"]]), read_architecture([headers["gemma3"]])
    assert (llama.layers, llama.width, llama.hidden, llama.heads, llama.kv_heads) == (7, 64, 128, 4, 2)
    assert (llama.head_width, llama.rope_width, llama.rope_interleaved, llama.score_scale) == (16, 16, True, 0.25)
    assert [read_architecture([headers[name]]).rope_interleaved for name in ARCHITECTURES[1:]] == [False] * 3
    assert not any(llama.is_local(layer) for layer in range(7))
    assert [gemma.is_local(layer) for layer in range(7)] == [True] * 5 + [False, True]
    assert (gemma.window_tokens, gemma.head_width, gemma.embedding_scale) == (GEMMA_WINDOW, 32, 8.0)
    assert matrix_shape(gemma, "attn_output") == (128, 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope__scaling__type", "yarn"),
        ("rope__scaling__factor", 8.0),
        ("expert_count", 4),
        ("final_logit_softcapping", 30.0),
        ("attention__causal", False),
        ("attention__sliding_window", 128),
        ("attention__head_count_kv", (2, 1, 2, 1, 2, 1, 2)),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(headers: dict[str, GGUFHeader], key: str, value: object) -> None:
    with pytest.raises(ModelUnsupportedError, match=key.split("__")[-1].replace("sliding_window", "sliding window")):
        read_architecture([_with(headers["llama"], **{key: value})])


def test_tensors_of_other_models_are_refused(headers: dict[str, GGUFHeader]) -> None:
    llama = headers["llama"]
    for name in ("blk.0.attn_sinks.weight", "blk.0.attn_q.scale", "cls.output.weight"):
        more = dataclasses.replace(llama, tensors=(*llama.tensors, TensorInfo(name, (64,), GGML_TYPES[0], 0, 256)))
        with pytest.raises(ModelUnsupportedError, match=name):
            read_architecture([more])
    for index, tensor in enumerate(llama.tensors):
        fewer = dataclasses.replace(llama, tensors=llama.tensors[:index] + llama.tensors[index + 1 :])
        if tensor.name == "output.weight":
            read_architecture([fewer])  # the embedding serves
            continue
        with pytest.raises(InvalidModelFileError):
            read_architecture([fewer])


_VALUES = st.one_of(st.integers(-3, 300), st.floats(), st.booleans(), st.text(max_size=4), st.tuples(st.integers()))
_KEYS = [
    *("block_count", "embedding_length", "feed_forward_length", "expert_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window"),
    *("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.factor"),
]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(ARCHITECTURES),
    values=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=2),
    at=st.none() | st.integers(0, 70),
    dims=st.lists(st.integers(1, 300), max_size=4),
)
def test_any_header_is_read_or_refused(
    headers: dict[str, GGUFHeader], name: str, values: dict[str, object], at: int | None, dims: list[int]
) -> None:
    header = headers[name]
    metadata = {**header.metadata, **{f"{name}.{key}": value for key, value in values.items()}}
    tensors = list(header.tensors)
    if at is not None:
        tensors[at % len(tensors)] = dataclasses.replace(tensors[at % len(tensors)], dims=tuple(dims))
    changed = dataclasses.replace(header, metadata=metadata, tensors=tuple(tensors))
    try:
        shape = read_architecture([changed])
    except ModelError:
        return
    assert shape.heads % shape.kv_heads == 0
    assert 0 < shape.rope_width <= shape.head_width
