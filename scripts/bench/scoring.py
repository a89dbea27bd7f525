"""The perplexity of a model on a text, and how fast it was read.

The text is cut into windows; the tokens of each window's second half are scored, given all that precede them there.
"""

from __future__ import annotations

import gzip
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.engine.threads import default_threads

_ROWS = 128  # of a step


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
    params = ContextParams(window, sequences=1, batch_tokens=_ROWS, outputs=_ROWS, threads=default_threads())
    context = Context(model, params)
    tokens = model.vocab.tokenize(text, add_special=False, parse_special=False)
    total, scored, batch, started = 0.0, 0, Batch(_ROWS), time.perf_counter()
    count = min(windows, len(tokens) // window)
    for number in range(count):
        part = tokens[number * window : (number + 1) * window]
        context.clear()
        for start in range(0, window, _ROWS):
            rows = part[start : start + _ROWS]
            batch.clear()
            batch.extend(rows, start, 0, outputs=len(rows))
            context.decode(batch)
            for row in range(len(rows)):
                following = start + row + 1
                if window // 2 <= following < window:
                    logits = context.logits(row).astype(np.float64)
                    total += logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[part[following]]
                    scored += 1
    rate = count * window / (time.perf_counter() - started)
    context.close()
    model.close()
    return Score(float(np.exp(total / scored)), scored, rate)
