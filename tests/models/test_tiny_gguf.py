"""The files that other tests are built on: sound to our reader, the same at every writing, and loaded by llama.cpp."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from edgellm.models.gguf import read_header
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_llama, write_tiny_lora, write_tiny_mamba

TEXT = "<|im_start|>user\nhello the world é<|im_end|>".encode()
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": write_tiny_llama,
    "llama-q8_0": partial(write_tiny_llama, weights="q8_0", vocab=600),
    "qwen2": partial(write_tiny_llama, architecture="qwen2"),
    "qwen3moe": partial(write_tiny_llama, architecture="qwen3moe", experts=4),
    "mixtral": partial(write_tiny_llama, experts=4),
    "mamba": write_tiny_mamba,
}


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


class Loaded:
    """A model in llama.cpp: tokenise, decode once, last logits."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        assert self.model
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def tokens(self, text: bytes) -> list[int]:
        room = (llama_cpp.llama_token * 256)()
        return list(room[: llama_cpp.llama_tokenize(self.vocab, text, len(text), room, 256, True, True)])

    def pieces(self, tokens: list[int]) -> bytes:
        out = b""
        for token in tokens:
            room = ctypes.create_string_buffer(64)
            length = llama_cpp.llama_token_to_piece(self.vocab, token, room, 64, 0, True)
            out += room.raw[:length]
        return out

    def run(self, tokens: list[int], *, embeddings: bool = False, lora: Path | None = None) -> np.ndarray:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.embeddings = 256, 1, embeddings
        context = llama_cpp.llama_init_from_model(self.model, params)
        assert context
        if lora:
            adapter = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(lora))
            assert adapter
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        row = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch points into it
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(row, len(tokens))) == 0
        if embeddings:
            found = llama_cpp.llama_get_embeddings_seq(context, 0)
            size = llama_cpp.llama_model_n_embd(self.model)
        else:
            found = llama_cpp.llama_get_logits_ith(context, -1)
            size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        result = np.ctypeslib.as_array(found, (size,)).copy()
        llama_cpp.llama_free(context)
        return result

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


@pytest.mark.parametrize("name", MODELS)
def test_decoders_run(tmp_path: Path, name: str) -> None:
    path = MODELS[name](tmp_path / "a.gguf")
    assert MODELS[name](tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    assert read_header(path).tensors
    loaded = Loaded(path)
    tokens = loaded.tokens(TEXT)
    assert loaded.pieces(tokens) == TEXT
    assert len(tokens) == 10  # two special tokens, words by merges, é byte by byte
    logits = loaded.run(tokens)
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 6
    loaded.close()


def test_lora_changes_the_logits(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf")
    loaded = Loaded(base)
    tokens = loaded.tokens(TEXT)
    plain = loaded.run(tokens)
    strong = loaded.run(tokens, lora=write_tiny_lora(tmp_path / "strong.gguf", base))
    nothing = loaded.run(tokens, lora=write_tiny_lora(tmp_path / "nothing.gguf", base, magnitude=0.0))
    assert np.abs(strong - plain).max() > 0.1
    np.testing.assert_allclose(nothing, plain, atol=1e-5)
    loaded.close()


def test_bert_embeds(tmp_path: Path) -> None:
    loaded = Loaded(write_tiny_bert(tmp_path / "bert.gguf"))
    one, other = (loaded.run(loaded.tokens(text), embeddings=True) for text in (b"Hello, world 42!", b"unlike"))
    assert one.shape == (64,)
    assert np.isfinite(one).all()
    assert not np.allclose(one, other, atol=1e-3)
    loaded.close()
