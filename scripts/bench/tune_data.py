"""The data of scripts/bench_tune: rows of questions and answers, and the tokens that edgellm makes of them."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.client import BenchError
from edgellm.backend.model import Model
from edgellm.chat.template import ChatTemplate
from edgellm.models.describe import describe
from edgellm.tune.coding import ModelCoder, TrainingSequence
from edgellm.tune.data import load_file


@dataclass(frozen=True)
class Rows:
    """Chat JSONL for edgellm, and the same as tokens for its rivals."""

    training: Path
    validation: Path
    tokens: Path  # .npz: tokens, mask and lengths of "training" and "validation"
    count: int
    training_tokens: int
    answer_tokens: int
    validation_tokens: int  # of the answers: what the validation loss is the mean over


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Questions and answers, one JSON object a line, gzipped or not. Raises BenchError."""
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [(str(row["question"]), str(row["answer"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not lines with a question and an answer: {error}") from None


def make_rows(source: Path, model: Path, folder: Path, counts: tuple[int, int], row_tokens: int) -> Rows:
    """The first counts[0] rows to train on, the last counts[1] to validate on. Raises BenchError for too few rows."""
    rows = read_rows(source)
    if sum(counts) > len(rows):
        raise BenchError(f"{source} has {len(rows)} rows, too few for {counts[0]} and {counts[1]}")
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"training": rows[: counts[0]], "validation": rows[len(rows) - counts[1] :]}
    for name, part in parts.items():
        _write(part, folder / f"{name}.jsonl")
    found = {name: encode(model, folder / f"{name}.jsonl", row_tokens) for name in parts}
    arrays: dict[str, np.ndarray] = {}
    for name, sequences in found.items():
        arrays[f"{name}_tokens"] = np.concatenate([one.tokens for one in sequences])
        arrays[f"{name}_mask"] = np.concatenate([one.mask for one in sequences])
        arrays[f"{name}_lengths"] = np.array([len(one.tokens) for one in sequences])
    np.savez(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]
    return Rows(
        folder / "training.jsonl",
        folder / "validation.jsonl",
        folder / "tokens.npz",
        len(found["training"]),
        len(arrays["training_tokens"]),
        int(arrays["training_mask"].sum()),
        int(arrays["validation_mask"].sum()),
    )


def _write(rows: Sequence[tuple[str, str]], path: Path) -> None:
    with path.open("w") as file:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def encode(model: Path, data: Path, row_tokens: int) -> tuple[TrainingSequence, ...]:
    """What the trainer makes of a file, sequence by sequence."""
    info, opened = describe(model), Model(model)
    try:
        vocab = opened.vocab
        bos, eos = vocab.special_piece(vocab.bos), vocab.special_piece(vocab.eos)
        with contextlib.ExitStack() as stack:
            template = stack.enter_context(ChatTemplate(info.chat_template, bos_token=bos, eos_token=eos))
            return load_file(data, "supervised", ModelCoder(vocab, template), row_tokens, least=1).sequences
    finally:
        opened.close()
