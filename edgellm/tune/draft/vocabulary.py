"""A byte-level BPE vocabulary cut to its first merges.

A merge makes its token of two others that earlier merges have made, so that the first merges are a tokenizer of their
own: it spells every text that the whole one spells, in more tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.errors import ConfigError, InvalidModelFileError, ModelUnsupportedError
from edgellm.models.gguf import GGUFHeader
from edgellm.models.gguf_values import GGUFArray
from edgellm.models.gguf_write import Numbers

_TOKENS = "tokenizer.ggml.tokens"
_KINDS = "tokenizer.ggml.token_type"
_SCORES = "tokenizer.ggml.scores"
_MERGES = "tokenizer.ggml.merges"
_NORMAL, _UNUSED = 1, 5  # llama.h, llama_token_type
_LETTERS = {"int32": "i", "uint32": "I", "float32": "f"}


@dataclass(frozen=True, slots=True)
class CutVocabulary:
    """Which tokens stay, and the metadata that say so."""

    kept: tuple[int, ...]  # by their old numbers, in their old order
    keys: dict[str, Numbers | tuple[str, ...]]


def cut_vocabulary(header: GGUFHeader, size: int) -> CutVocabulary:
    """The vocabulary of at most `size` tokens: bytes, special tokens, and as many of the first merges as fit.

    Raises ModelUnsupportedError unless it is byte-level BPE, ConfigError if `size` is too small or not smaller than the
    vocabulary, InvalidModelFileError if the file's lists do not go together.
    """
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or _MERGES not in header.metadata:
        raise ModelUnsupportedError(f"{header.path.name}: only a byte-level BPE vocabulary can be cut")
    tokens, merges = _strings(header, _TOKENS), _strings(header, _MERGES)
    kinds = _numbers(header, _KINDS) if _KINDS in header.metadata else [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise InvalidModelFileError(f"{header.path.name}: {_KINDS} is not of the vocabulary's length")
    named = _named_tokens(header, len(tokens))
    kept = {number for number, token in enumerate(tokens) if _is_base(token, kinds[number])} | set(named.values())
    if not len(kept) < size < len(tokens):
        raise ConfigError(f"the vocabulary can be cut to {len(kept) + 1} to {len(tokens) - 1} tokens, not to {size}")
    taken = _take_merges(tokens, merges, kept, size)
    order = tuple(sorted(kept))
    places = {old: new for new, old in enumerate(order)}
    keys: dict[str, Numbers | tuple[str, ...]] = {
        _TOKENS: tuple(tokens[number] for number in order),
        _KINDS: Numbers("int32", tuple(int(kinds[number]) for number in order)),
        _MERGES: taken,
    }
    if _SCORES in header.metadata:
        scores = _numbers(header, _SCORES)
        keys[_SCORES] = Numbers("float32", tuple(float(scores[number]) for number in order))
    keys |= {key: Numbers("uint32", places[number]) for key, number in named.items()}
    own = f"{header.metadata['general.architecture']}.vocab_size"
    if own in header.metadata:
        keys[own] = Numbers("uint32", len(order))
    return CutVocabulary(order, keys)


def _is_base(token: str, kind: int) -> bool:
    """Whether a token stays in any case: a byte's, or one that somebody defined."""
    return len(token) == 1 if kind == _NORMAL else kind != _UNUSED


def _named_tokens(header: GGUFHeader, count: int) -> dict[str, int]:
    """The keys that name a token. A number that is none of the vocabulary's stands for no token, and is left alone."""
    found = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.ggml.")}
    return {
        key: value
        for key, value in found.items()
        if key.endswith("_token_id") and isinstance(value, int) and 0 <= value < count
    }


def _take_merges(tokens: Sequence[str], merges: Sequence[str], kept: set[int], size: int) -> tuple[str, ...]:
    """The first merges until `kept`, which grows by what they make, has `size` tokens."""
    numbers = {token: number for number, token in enumerate(tokens)}
    taken = []
    for merge in merges:
        at = merge.find(" ", 1)  # as llama.cpp takes them apart
        parts = (merge[:at], merge[at + 1 :]) if at > 0 else ()
        made = numbers.get("".join(parts), -1)
        if made < 0 or any(numbers.get(part) not in kept for part in parts):
            continue
        if made not in kept:
            if len(kept) == size:
                break
            kept.add(made)
        taken.append(merge)
    return tuple(taken)


def _strings(header: GGUFHeader, key: str) -> list[str]:
    """Raises InvalidModelFileError where one is not UTF-8, for it could not be written again."""
    if header.value_types.get(key) != "string[]":
        raise InvalidModelFileError(f"{header.path.name}: {key} is missing or not a list of strings")
    data, count = _raw(header, key)
    found, at = [], 0
    try:
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(data[at + 8 : at + 8 + length].decode())
            at += 8 + length
    except UnicodeDecodeError:
        raise InvalidModelFileError(f"{header.path.name}: a string of {key} is not UTF-8") from None
    return found


def _numbers(header: GGUFHeader, key: str) -> Sequence[Any]:
    letter = _LETTERS.get(header.value_types[key].removesuffix("[]"))
    if letter is None or not header.value_types[key].endswith("[]"):
        raise InvalidModelFileError(f"{header.path.name}: {key} is not a list of numbers")
    data, count = _raw(header, key)
    return struct.unpack_from(f"<{count}{letter}", data)


def _raw(header: GGUFHeader, key: str) -> tuple[bytes, int]:
    """The bytes of an array's elements, and how many there are."""
    start, end = header.places[key]
    value = header.metadata[key]
    count = value.length if isinstance(value, GGUFArray) else len(value) if isinstance(value, tuple) else 0
    first = 8 + len(key.encode()) + 4 + 4 + 8  # key, type, element type, length
    with header.path.open("rb") as file:
        file.seek(start + first)
        return file.read(end - start - first), count
