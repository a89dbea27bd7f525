"""Models cut to some layers and a smaller vocabulary: what is left is byte for byte what was there."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgellm.backend.model import Model, VocabFile  # noqa: E402
from edgellm.errors import ConfigError, InvalidModelFileError, ModelUnsupportedError  # noqa: E402
from edgellm.models.bundled import bundled_path  # noqa: E402
from edgellm.models.describe import describe  # noqa: E402
from edgellm.tune.draft.cut import Choice, choose_layers, cut_model  # noqa: E402
from tests.support.gguf_writer import SPECIAL_TOKENS, vocabulary  # noqa: E402
from tests.support.texts import PASSAGES, texts  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_mamba  # noqa: E402
from tests.support.vocabularies import write_vocabulary  # noqa: E402
from tests.tune.rig import TEXT, true_logits  # noqa: E402

TOKENS = list(TEXT)
_SMALL = 4096


def _tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(str(path)).tensors}


@pytest.fixture(scope="module")
def smol_cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = bundled_path()
    assert source is not None
    path = tmp_path_factory.mktemp("cut") / "smol.gguf"
    cut_model(source, path, layers=(0,), vocabulary=_SMALL)
    return path


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("first", (0, 1, 2, 3)), ("ends", (0, 1, 2, 29)), ("even", (0, 10, 19, 29))],
)
def test_which_layers_stay(choice: Choice, expected: tuple[int, ...]) -> None:
    assert choose_layers(30, 4, choice) == expected
    assert choose_layers(30, 30, choice) == tuple(range(30))
    assert len(choose_layers(30, 1, choice)) == 1
    for count in (0, 31):
        with pytest.raises(ConfigError, match="1 to 30"):
            choose_layers(30, count, choice)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("weights", ["f32", "q4_1"])
def test_with_all_layers_the_model_is_the_same(tmp_path: Path, architecture: str, weights: str) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture, layers=3, weights=weights)
    cut_model(source, tmp_path / "cut.gguf", layers=range(3))
    assert _tensors(tmp_path / "cut.gguf") == _tensors(source)
    assert torch.equal(true_logits(tmp_path / "cut.gguf", TOKENS), true_logits(source, TOKENS))


def test_layers_move_up_with_their_bytes(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf", layers=6, weights="q8_0", tied=True)
    cut_model(source, tmp_path / "cut.gguf", layers=(0, 2, 5))
    whole, cut = _tensors(source), _tensors(tmp_path / "cut.gguf")
    for new, old in enumerate((0, 2, 5)):
        for name in ("attn_q.weight", "ffn_down.weight", "ffn_norm.weight"):
            assert cut[f"blk.{new}.{name}"] == whole[f"blk.{old}.{name}"]
    assert cut["token_embd.weight"] == whole["token_embd.weight"]
    assert describe(tmp_path / "cut.gguf").layers == 3
    assert len(cut) == 2 + 3 * 9
    true_logits(tmp_path / "cut.gguf", TOKENS)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 6), (-1, 2)])
def test_layers_that_are_not_there(tmp_path: Path, layers: tuple[int, ...]) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf", layers=6)
    with pytest.raises(ConfigError, match="must rise"):
        cut_model(source, tmp_path / "cut.gguf", layers=layers)
    assert not (tmp_path / "cut.gguf").exists()


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    gemma = write_tiny_llama(tmp_path / "g.gguf", architecture="gemma3", layers=6)
    with pytest.raises(ModelUnsupportedError, match="gemma3"):
        cut_model(gemma, tmp_path / "cut.gguf", layers=(0,))
    with pytest.raises(ModelUnsupportedError, match="mamba"):
        cut_model(write_tiny_mamba(tmp_path / "m.gguf"), tmp_path / "cut.gguf", layers=(0,))
    with pytest.raises(InvalidModelFileError):
        cut_model(write_vocabulary(tmp_path / "v.gguf", "bytes"), tmp_path / "cut.gguf", layers=(0,))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_rows_go_with_their_tokens(tmp_path: Path, tied: bool, weights: str) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf", tied=tied, weights=weights, vocab=350)
    tokens, _ = vocabulary()
    cut_model(source, tmp_path / "cut.gguf", layers=(0, 1), vocabulary=270)
    kept = [*range(267), *range(len(tokens) - len(SPECIAL_TOKENS), len(tokens))]  # bytes, 11 merges, special tokens
    whole = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(source)).tensors}
    cut = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(tmp_path / "cut.gguf")).tensors}
    for name in ("token_embd.weight", *(() if tied else ("output.weight",))):
        assert np.array_equal(cut[name], whole[name][kept])
    assert cut["blk.1.ffn_up.weight"].tobytes() == whole["blk.1.ffn_up.weight"].tobytes()
    # The same bytes are the same input, so that kept tokens have the logits that they had.
    expected = true_logits(source, TOKENS)[:, kept]
    assert torch.allclose(true_logits(tmp_path / "cut.gguf", TOKENS), expected, atol=1e-4)


def test_special_tokens_keep_their_part(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf")
    cut_model(source, tmp_path / "cut.gguf", layers=(0,), vocabulary=265)
    before, after = Model(source), Model(tmp_path / "cut.gguf")
    for name in ("bos", "eos", "eot"):
        old, new = getattr(before.vocab, name), getattr(after.vocab, name)
        assert before.vocab.special_piece(old) == after.vocab.special_piece(new)
    assert {after.vocab.special_piece(token) for token in after.vocab.end_tokens} == {
        before.vocab.special_piece(token) for token in before.vocab.end_tokens
    }
    found = after.vocab.tokenize("<|im_start|>hi<|im_end|>", add_special=False, parse_special=True)
    assert [after.vocab.special_piece(token) for token in (found[0], found[-1])] == ["<|im_start|>", "<|im_end|>"]
    before.close()
    after.close()


def test_sizes_that_a_vocabulary_cannot_have(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf")
    whole = len(vocabulary()[0])
    for size in (0, 259, whole, whole + 1):
        with pytest.raises(ConfigError, match=f"260 to {whole - 1} tokens, not to {size}"):
            cut_model(source, tmp_path / "cut.gguf", layers=(0,), vocabulary=size)
    for size in (260, whole - 1):
        cut_model(source, tmp_path / "cut.gguf", layers=(0,), vocabulary=size)
        assert describe(tmp_path / "cut.gguf").vocabulary == size


@given(text=texts)
def test_a_cut_tokenizer_spells_what_the_whole_one_does(smol_cut: Path, text: str) -> None:
    source = bundled_path()
    assert source is not None
    cut, whole = _vocabularies(smol_cut, source)
    _check(cut, whole, text)


@given(text=st.text(max_size=40))
def test_any_text(smol_cut: Path, text: str) -> None:
    source = bundled_path()
    assert source is not None
    cut, whole = _vocabularies(smol_cut, source)
    _check(cut, whole, text)


@pytest.mark.parametrize("text", PASSAGES)
def test_passages(smol_cut: Path, text: str) -> None:
    source = bundled_path()
    assert source is not None
    cut, whole = _vocabularies(smol_cut, source)
    assert cut.vocab.n_tokens == _SMALL
    _check(cut, whole, text)


_open: dict[Path, VocabFile] = {}


def _vocabularies(*paths: Path) -> list[VocabFile]:
    return [_open.get(path) or _open.setdefault(path, VocabFile(path)) for path in paths]


def _check(cut: VocabFile, whole: VocabFile, text: str) -> None:
    """The same bytes; and tokens of the cut that the whole one merges no further are the whole one's, too."""
    small = cut.vocab.tokenize(text, add_special=False, parse_special=True)
    large = whole.vocab.tokenize(text, add_special=False, parse_special=True)
    pieces = [cut.vocab.special_bytes(token) for token in small]
    expected = [whole.vocab.special_bytes(token) for token in large]
    assert b"".join(pieces) == b"".join(expected)
    ends = set(np.cumsum([len(piece) for piece in pieces]).tolist())
    assert set(np.cumsum([len(piece) for piece in expected]).tolist()) <= ends  # later merges only join tokens
