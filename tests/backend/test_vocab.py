"""Text to token ids and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.backend.model import Model, VocabFile
from edgellm.backend.sampler import Grammar, check_grammar
from edgellm.backend.vocab import TokenKind
from edgellm.errors import GrammarError, ModelLoadError
from edgellm.models.bundled import bundled_path
from tests.support.gguf_writer import SPECIAL_TOKENS
from tests.support.vocabularies import vocabulary


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_text_survives(model: Model, text: str) -> None:
    tokens = model.vocab.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(map(model.vocab.piece, tokens)) == text.encode()


def test_special_tokens_are_read_only_where_they_are_meant(model: Model) -> None:
    vocab = model.vocab
    assert vocab.tokenize("<|im_end|>", add_special=False, parse_special=True) == [vocab.eos]
    assert vocab.eos not in vocab.tokenize("<|im_end|>", add_special=False, parse_special=False)
    assert vocab.piece(vocab.eos) == b""
    assert vocab.special_piece(vocab.eos) == "<|im_end|>"
    assert vocab.special_piece(-1) == vocab.special_piece(vocab.n_tokens) == ""


def test_ends(model: Model) -> None:
    vocab = model.vocab
    assert vocab.eos in vocab.end_tokens
    assert all(vocab.is_end(token) for token in vocab.end_tokens)
    assert not vocab.is_end(65)


def test_the_longest_piece_bounds_the_tokens_of_a_text(model: Model) -> None:
    assert model.vocab.longest_piece_bytes == len("<|endoftext|>")


def test_all_pieces_at_once_are_those_of_each(model: Model) -> None:
    vocab = model.vocab
    assert vocab.pieces == tuple(vocab._read_piece(token, special=False) for token in range(vocab.n_tokens))
    assert b"" in vocab.pieces


def test_pieces_longer_than_most() -> None:
    vocab = vocabulary("gemma")
    assert max(map(len, vocab.pieces)) == vocab.longest_piece_bytes


def test_kinds_of_tokens(model: Model) -> None:
    kinds = model.vocab.kinds
    assert kinds[-len(SPECIAL_TOKENS) :] == (TokenKind.CONTROL,) * len(SPECIAL_TOKENS)
    assert set(kinds[: -len(SPECIAL_TOKENS)]) == {TokenKind.TEXT}
    vocab = vocabulary("spaced")
    assert [vocab.kinds[token] for token in (0, 1, 3, 4, 259, 260)] == [
        TokenKind.UNUSED,
        TokenKind.CONTROL,
        TokenKind.CONTROL,
        TokenKind.BYTE,
        TokenKind.BYTE,
        TokenKind.TEXT,
    ]


def test_a_vocabulary_alone_is_the_models(model: Model) -> None:
    alone = VocabFile(model.path)
    try:
        assert alone.vocab.pieces == model.vocab.pieces
        assert alone.vocab.kinds == model.vocab.kinds
        assert alone.vocab.tokenize("hello", add_special=True, parse_special=True) == model.vocab.tokenize(
            "hello", add_special=True, parse_special=True
        )
    finally:
        alone.close()
        alone.close()


def test_a_file_without_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"could not load none\.gguf"):
        VocabFile(tmp_path / "none.gguf")


@pytest.mark.parametrize("gbnf", ["", "root ::= nowhere", 'other ::= "a"', 'root ::= "a', "root ::= root"])
def test_grammars_that_are_refused(model: Model, gbnf: str) -> None:
    with pytest.raises(GrammarError):
        check_grammar(model.vocab, Grammar(gbnf))


def test_grammars_that_are_not(model: Model) -> None:
    check_grammar(model.vocab, Grammar('root ::= "a" other*\nother ::= [0-9]'))
    check_grammar(model.vocab, Grammar('root ::= "<" [0-9]', lazy_patterns=("(<)",)))


_LONG_RUN = """
import sys
from pathlib import Path
from edgellm.backend.model import Model, VocabFile
vocab = Model(Path(sys.argv[1])).vocab
tokens = vocab.tokenize("a" * 60_000, add_special=False, parse_special=False)
assert b"".join(map(vocab.piece, tokens)) == b"a" * 60_000
"""


def test_long_texts_have_a_stack_of_their_own(tmp_path: Path) -> None:
    """Tekken's splitter is one of those that recurse at every character; on a usual stack this ends the process."""
    bundled = bundled_path()
    assert bundled is not None
    data = bundled.read_bytes()
    key = b"tokenizer.ggml.pre"
    assert data.count(key) == 1
    start = data.index(b"smollm", data.index(key))
    (tmp_path / "tekken.gguf").write_bytes(data[:start] + b"tekken" + data[start + 6 :])
    done = subprocess.run(
        [sys.executable, "-c", _LONG_RUN, str(tmp_path / "tekken.gguf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
