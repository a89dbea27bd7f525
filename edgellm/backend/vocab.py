"""A model's vocabulary: text to token ids and back. Immutable, so any thread may use it while the model is loaded."""

from __future__ import annotations

import ctypes
import enum
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from edgellm.backend.library import lib
from edgellm.errors import BackendError

_T = TypeVar("_T")
_INLINE_BYTES = 4096
_STACK_BYTES_PER_BYTE = 1 << 10
_STACK_BYTES_MAX = 1 << 30
_stack_lock = threading.Lock()  # the size of a new thread's stack is a setting of the whole process


class TokenKind(enum.Enum):
    """What a token is for."""

    TEXT = enum.auto()  # stands for text, tokens a vocabulary's maker defined included
    BYTE = enum.auto()  # stands for one byte that no other token spells: SentencePiece's <0x0A>
    CONTROL = enum.auto()  # steers the model
    UNUSED = enum.auto()  # stands for nothing: fillers, and what is written for unknown text


class Vocab:
    """Wraps `llama_vocab`. Valid while its Model is open."""

    def __init__(self, model_handle: Any) -> None:
        low = lib()
        self._handle = low.llama_model_get_vocab(model_handle)
        self.n_tokens: int = low.llama_vocab_n_tokens(self._handle)
        self.bos: int = low.llama_vocab_bos(self._handle)
        self.eos: int = low.llama_vocab_eos(self._handle)
        self.eot: int = low.llama_vocab_eot(self._handle)
        self.adds_bos: bool = bool(low.llama_vocab_get_add_bos(self._handle))
        self.fim_prefix: int = low.llama_vocab_fim_pre(self._handle)
        self.fim_suffix: int = low.llama_vocab_fim_suf(self._handle)
        self.fim_middle: int = low.llama_vocab_fim_mid(self._handle)
        self._pieces: dict[int, bytes] = {}

    @property
    def handle(self) -> Any:
        """The `llama_vocab *`, for the sampler."""
        return self._handle

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `add_special` adds what the model wants at the ends (BOS); `parse_special` reads `<|im_start|>` and the like as
        tokens instead of text.
        """
        data = text.encode("utf-8", "surrogatepass")
        if len(data) <= _INLINE_BYTES:
            return self._tokenize(data, add_special, parse_special)
        return _with_deep_stack(len(data), lambda: self._tokenize(data, add_special, parse_special))

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        size = len(data) + 8
        buffer = (ctypes.c_int32 * size)()
        low = lib()
        count = low.llama_tokenize(self._handle, data, len(data), buffer, size, add_special, parse_special)
        if count < 0:  # more tokens than bytes: some vocabularies add a prefix
            size = -count
            buffer = (ctypes.c_int32 * size)()
            count = low.llama_tokenize(self._handle, data, len(data), buffer, size, add_special, parse_special)
        if count < 0:
            raise BackendError("llama.cpp could not tokenise the text")
        return list(buffer[:count])

    def fault(self) -> str | None:
        """What is missing that llama.cpp takes for granted while it tokenises: it would end the process."""
        low = lib()
        if self.adds_bos and self.bos < 0:
            return "its tokenizer adds a BOS token, but names none"
        if low.llama_vocab_get_add_eos(self._handle) and self.eos < 0:
            return "its tokenizer adds an EOS token, but names none"
        if low.llama_vocab_type(self._handle) != low.LLAMA_VOCAB_TYPE_SPM:
            return None
        missing = {f"<0x{byte:02X}>".encode(): bytes([byte]) for byte in range(256)}
        for token in range(self.n_tokens):
            text = low.llama_vocab_get_text(self._handle, token)
            missing.pop(text, None)
            if not missing:  # as a rule they are among the first few hundred
                return None
        texts = {low.llama_vocab_get_text(self._handle, token) for token in range(self.n_tokens)}
        if all(single in texts for single in missing.values()):
            return None
        return f"its vocabulary has no tokens for {len(missing)} of the 256 bytes"

    def piece(self, token: int) -> bytes:
        """The bytes `token` stands for; control tokens such as `<|im_end|>` give none."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read_piece(token, special=False)
        return found

    def special_piece(self, token: int) -> str:
        """The text of any token, control tokens included: what a chat template calls bos_token or eos_token."""
        return self._read_piece(token, special=True).decode("utf-8", "replace") if 0 <= token < self.n_tokens else ""

    def special_bytes(self, token: int) -> bytes:
        """The bytes of any token, control tokens included."""
        return self._read_piece(token, special=True)

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        low = lib()
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = low.llama_token_to_piece(self._handle, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """`piece` of every token, read at once: in a third of the time."""
        low, handle = lib(), self._handle
        read, size = low.llama_token_to_piece, 256
        buffer = ctypes.create_string_buffer(size)
        found = []
        for token in range(self.n_tokens):
            count = read(handle, token, buffer, size, 0, False)
            found.append(self.piece(token) if count < 0 else ctypes.string_at(buffer, count))
        return tuple(found)

    @functools.cached_property
    def kinds(self) -> tuple[TokenKind, ...]:
        """What every token is for."""
        low, handle = lib(), self._handle
        order = (
            (low.LLAMA_TOKEN_ATTR_UNUSED | low.LLAMA_TOKEN_ATTR_UNKNOWN, TokenKind.UNUSED),
            (low.LLAMA_TOKEN_ATTR_CONTROL, TokenKind.CONTROL),
            (low.LLAMA_TOKEN_ATTR_BYTE, TokenKind.BYTE),
        )

        @functools.cache
        def kind(attributes: int) -> TokenKind:
            return next((kind for mask, kind in order if attributes & mask), TokenKind.TEXT)

        return tuple(kind(low.llama_vocab_get_attr(handle, token)) for token in range(self.n_tokens))

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (EOS, EOT and their like)."""
        return bool(lib().llama_vocab_is_eog(self._handle, token))

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """All end-of-generation tokens."""
        low, handle = lib(), self._handle
        return frozenset(token for token in range(self.n_tokens) if low.llama_vocab_is_eog(handle, token))

    @functools.cached_property
    def longest_piece_bytes(self) -> int:
        """Most bytes that one token stands for, so that n bytes of text are at least n / longest tokens."""
        return max(len(self._read_piece(token, special=True)) for token in range(self.n_tokens))


def _with_deep_stack(size: int, function: Callable[[], _T]) -> _T:
    """Runs `function` in a thread whose stack goes with `size`, the text's bytes.

    The splitters of many vocabularies use std::regex, which recurses at every character of a run (llama.cpp's
    src/unicode.cpp), some 400 bytes each. Stack that is not touched costs nothing.
    """
    results: list[_T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            faults.append(error)

    with _stack_lock:
        usual = threading.stack_size(min((16 << 20) + size * _STACK_BYTES_PER_BYTE, _STACK_BYTES_MAX))
        try:
            thread = threading.Thread(target=run, name="edgellm-tokenize", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if faults:
        raise faults[0]
    return results[0]
