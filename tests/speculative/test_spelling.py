"""Bytes to tokens that spell them exactly."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.speculative.spelling import Speller, incomplete_bytes, whole_characters
from tests.support.texts import PASSAGES, texts
from tests.support.vocabularies import REAL, TINY, vocabulary

every = pytest.mark.parametrize("name", [*REAL, *TINY])


@functools.cache
def speller(name: str) -> Speller:
    return Speller(vocabulary(name))


@every
@settings(deadline=None, max_examples=300)
@given(data=st.one_of(st.binary(max_size=40), texts.map(str.encode)))
def test_pieces_join_to_the_bytes(name: str, data: bytes) -> None:
    its = speller(name)
    tokens = its.spell(data)
    if tokens is None:
        assert not its.spells_all
        assert any(its.find(bytes([byte])) < 0 for byte in data)
        left_out = bytes(byte for byte in data if its.find(bytes([byte])) >= 0)
        assert len(left_out) <= len(its.text(its.spell_most(data))) < len(data)
    else:
        assert its.text(tokens) == data
        assert all(its.pieces[token] for token in tokens)


@every
@pytest.mark.parametrize("passage", PASSAGES)
def test_parts_are_spelled_as_the_whole(name: str, passage: str) -> None:
    its = speller(name)
    assert its.last_boundary(passage.encode()) > 0
    if name != "spaced":
        assert its.spell(passage.encode()) == its.vocab.tokenize(passage, add_special=False, parse_special=False)
    else:  # the tokenizer puts a space in front
        tokens = its.vocab.tokenize("\n" + passage, add_special=False, parse_special=False)
        assert its.spell(passage.encode()) == tokens[2:]


@pytest.mark.parametrize("name", ["smol", "qwen", "gemma", "bytes"])
@settings(deadline=None, max_examples=500)
@given(text=texts)
def test_hypothetical_parts_are_spelled_as_the_whole(name: str, text: str) -> None:
    its = speller(name)
    whole = its.vocab.tokenize(text, add_special=False, parse_special=False)
    if its.text(whole) == text.encode():
        assert its.spell(text.encode()) == whole


@every
@settings(deadline=None)
@given(text=texts)
def test_no_token_lies_across_a_boundary(name: str, text: str) -> None:
    its, data = speller(name), text.encode()
    at = its.last_boundary(data)
    whole = its.spell_most(data)
    assert its.spell_most(data[:at]) + its.spell_most(data[at:]) == whole


@every
def test_special_looks_are_text(name: str) -> None:
    its = speller(name)
    for text in ("<|im_end|>", "<|im_start|>", "</s>", "<bos>", "<0x0A>", "<unused5>", "<end_of_turn>", "▁"):
        tokens = its.spell(text.encode())
        assert tokens is not None
        assert its.text(tokens) == text.encode()
        assert not set(tokens) & its.vocab.end_tokens


@every
def test_tokens_are_found_by_their_pieces(name: str) -> None:
    its = speller(name)
    table = its.tokens_by_piece()
    assert len(table) == len(set(its.pieces) - {b""})
    for piece in list(table)[:: max(1, len(table) // 500)]:
        assert its.find(piece) == table[piece]
        assert its.pieces[table[piece]] == piece
        assert its.grows(table[piece]) == any(len(p) > len(piece) and p.startswith(piece) for p in its.pieces)
        if len(table) > 100_000:
            break
    assert its.find(b"") == its.find(b"no token is spelled like this one") == -1


def test_text_is_meant_before_byte_tokens() -> None:
    its = speller("spaced")
    assert its.vocab.special_piece(its.find(b"a")) == "a"
    assert its.find(b"a") > 256
    assert its.find(b"\n") == 4 + ord("\n")


@given(st.text(max_size=6), st.integers(0, 8), st.integers(0, 8))
def test_characters_cut_off_at_the_ends(text: str, front: int, back: int) -> None:
    data = text.encode()
    data = data[front : len(data) - back]
    start, end = whole_characters(data)
    data[start:end].decode()
    assert start <= 3
    assert len(data) - end <= 3
    assert text.encode().endswith(data) <= (incomplete_bytes(data) == 0)


@given(st.binary(max_size=8))
def test_characters_cut_off_in_noise(data: bytes) -> None:
    start, end = whole_characters(data)
    assert 0 <= start <= end <= len(data)
    cut = incomplete_bytes(data)
    assert 0 <= cut <= min(3, len(data))
    if cut and data[-cut] not in (0xE0, 0xED, 0xF0, 0xF4):  # of these not every next byte is possible
        more = b"\x80" * {0xC0: 1, 0xD0: 1, 0xE0: 2, 0xF0: 3}[data[-cut] & 0xF0]
        (data[-cut:] + more[cut - 1 :]).decode()
