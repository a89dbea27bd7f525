"""The perplexity of a model on a text, and how fast it was read."""

from __future__ import annotations

import gzip
import time
from dataclasses import dataclass
from pathlib import Path

from edgellm.backend.model import Model
from edgellm.engine.threads import default_threads
from edgellm.moe.perplexity import perplexity


@dataclass(frozen=True, slots=True)
class Score:
    perplexity: float
    scored_tokens: int
    tokens_per_s: float


def read_text(path: Path) -> str:
    """A text file, compressed if its name ends in .gz."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")


def score(path: Path, text: str, *, packed: bool, window: int, windows: int) -> Score:
    """Scores the model in `path` on the first `windows` windows of `text`, of `window` tokens each."""
    model = Model(path, mapped=not packed, packed=packed)
    tokens = model.vocab.tokenize(text, add_special=False, parse_special=False)
    started = time.perf_counter()
    found = perplexity(model, tokens, window=window, windows=windows, threads=default_threads())
    rate = found.windows * window / (time.perf_counter() - started)
    model.close()
    return Score(found.value, found.scored_tokens, rate)
