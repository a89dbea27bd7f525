"""Vocabularies without their models: three families of real ones, and tiny ones for what those do not have."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import gguf
import pytest

from edgellm.backend.model import VocabFile
from edgellm.backend.vocab import Vocab
from edgellm.models.bundled import bundled_path
from tests.support.gguf_writer import add_bpe

MODELS = Path(os.environ.get("EDGELLM_TEST_MODELS") or "~/.cache/edgellm/test-models").expanduser()
REAL = ("smol", "qwen", "gemma")
TINY = ("spaced", "bytes")
_FILES = {"qwen": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "gemma": "gemma-3-270m-q4_k_m.gguf"}


def vocabulary(name: str) -> Vocab:
    """One of REAL: BPE of 49,152 and of 151,936 tokens, SentencePiece of 262,144; or of TINY. Skips if not there.

    "spaced" is SentencePiece as Llama 2's: it puts a space in front of every text, and adds a BOS. "bytes" is BPE of
    256 bytes and a few words.
    """
    path = bundled_path() if name == "smol" else MODELS / _FILES[name] if name in REAL else None
    if path is not None and not path.is_file():
        pytest.skip(f"{path.name} is not there; scripts/fetch_models brings it")
    return _load(name, path).vocab


@functools.cache
def _load(name: str, path: Path | None) -> VocabFile:
    if path is not None:
        return VocabFile(path)
    with tempfile.TemporaryDirectory() as folder:
        return VocabFile(write_vocabulary(Path(folder) / f"{name}.gguf", name))


def write_vocabulary(path: Path, name: str) -> Path:
    """A GGUF file of one of TINY, without tensors."""
    out = gguf.GGUFWriter(str(path), "llama")
    if name == "bytes":
        add_bpe(out)
    else:
        _add_spaced(out)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    return path


def _add_spaced(out: gguf.GGUFWriter) -> None:
    words = ("the", "hello", "world", "hel", "lo", "he", "wor", "ld", "th", "is")
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = ["▁▁", "▁▁▁▁", *("▁" + word for word in words), *words, "▁h", "▁he", "▁hel", "▁w", "▁wor", "▁t", "▁th"]
    pieces += ["or", "wo", "ll", "el", "ell", "é", "中"]
    pieces = [*dict.fromkeys(sorted(pieces, key=len, reverse=True)), "▁", *letters]  # longer ones are merged first
    kinds, special = gguf.TokenType, ["<unk>", "<s>", "</s>", "<|im_end|>"]
    singles = [f"<0x{byte:02X}>" for byte in range(256)]
    out.add_tokenizer_model("llama")
    out.add_token_list(special + singles + pieces)
    out.add_token_scores([0.0] * (len(special) + 256) + [-float(rank) for rank in range(len(pieces))])
    types = [kinds.UNKNOWN] + [kinds.CONTROL] * 3 + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(pieces)
    out.add_token_types(types)
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(True)
    out.add_add_space_prefix(True)
