"""TextAssembler against the slow reference: decode everything, then cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.chat.text import TextAssembler
from edgellm.errors import RequestError

# Few distinct characters, so that stop strings overlap and half match often; bytes of cut and of invalid characters.
ATOMS = [b"a", b"b", b"ab", b"", "é".encode(), "😀".encode(), b"\xf0", b"\x9f", b"\x98\x80", b"\xff", b"\xc3", b"\xa9"]
PIECES = st.lists(st.one_of(st.sampled_from(ATOMS), st.binary(max_size=3)), max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀\ufffd", min_size=1, max_size=4), max_size=4).map(tuple)


def reference(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[str, str | None]:
    text = b"".join(pieces).decode("utf-8", "replace")
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def run(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[list[str], TextAssembler]:
    assembler = TextAssembler(stops, pieces.__getitem__)
    out = []
    for token in range(len(pieces)):
        out.append(assembler.feed(token))
        assert assembler.tokens_released <= assembler.tokens_fed
        if assembler.stopped:
            break
    out.append(assembler.finish())
    return out, assembler


@settings(deadline=None)
@given(PIECES, STOPS)
def test_equals_the_reference(pieces: list[bytes], stops: tuple[str, ...]) -> None:
    out, assembler = run(pieces, stops)
    assert ("".join(out), assembler.stop_string) == reference(pieces, stops)


@settings(deadline=None)
@given(PIECES)
def test_without_stop_strings_only_a_cut_character_is_held_back(pieces: list[bytes]) -> None:
    assembler = TextAssembler((), pieces.__getitem__)
    emitted, fed = "", b""
    for token, piece in enumerate(pieces):
        emitted += assembler.feed(token)
        fed += piece
        assert fed.decode("utf-8", "replace").startswith(emitted)
        assert len(fed.decode("utf-8", "replace")) - len(emitted) <= 3  # bytes of one unfinished character
    emitted += assembler.finish()
    assert emitted == fed.decode("utf-8", "replace")
    assert assembler.tokens_released == len(pieces)


@settings(deadline=None)
@given(PIECES, STOPS)
def test_a_token_is_released_with_the_last_of_its_text(pieces: list[bytes], stops: tuple[str, ...]) -> None:
    whole = b"".join(pieces).decode("utf-8", "replace")
    assembler = TextAssembler(stops, pieces.__getitem__)
    emitted = ""
    for token in range(len(pieces)):
        emitted += assembler.feed(token)
        if assembler.stopped:
            break
        released = b"".join(pieces[: assembler.tokens_released]).decode("utf-8", "ignore")
        assert len(released) <= len(emitted)  # never ahead of the text
        if emitted == whole:
            assert assembler.tokens_released == assembler.tokens_fed  # and never behind it


def test_tokens_of_a_stop_string_stay_unreleased() -> None:
    pieces = [b"one-", b"two", b" en", b"d", b"never"]
    out, assembler = run(pieces, (" end",))
    assert out == ["one-", "two", "", "", ""]
    assert (assembler.stopped, assembler.stop_string) == (True, " end")
    assert (assembler.tokens_fed, assembler.tokens_released) == (4, 2)
    assert assembler.feed(4) == ""


def test_a_token_that_the_stop_string_cuts_is_released() -> None:
    out, assembler = run([b"a", b"bS", b"TOP"], ("STOP",))
    assert out == ["a", "b", "", ""]
    assert assembler.tokens_released == 2
    out, assembler = run([b"a", b"bSTOPc"], ("STOP",))
    assert out == ["a", "b", ""]
    assert assembler.tokens_released == 2


def test_held_back_text_is_released_with_its_tokens() -> None:
    assembler = TextAssembler(("abcd",), [b"ab", b"c", b"x"].__getitem__)
    assert [assembler.feed(0), assembler.feed(1)] == ["", ""]
    assert assembler.tokens_released == 0
    assert assembler.feed(2) == "abcx"
    assert assembler.tokens_released == 3


def test_of_two_stop_strings_the_first_complete_one_counts() -> None:
    assert run([b"xab", b"cd"], ("abcd", "bc"))[0] == ["x", "a", ""]
    assert run([b"xabc"], ("bc", "abc"))[1].stop_string == "abc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        TextAssembler(("",), bytes)
