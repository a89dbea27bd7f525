"""The perplexity of a model, paged or not, on a text given as tokens.

The text is cut into windows; the tokens of each window's second half are scored, given all that precede them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.errors import ConfigError

WINDOW = 512
"""Tokens of a window, if nothing else is asked for."""

_ROWS = 128  # most rows of a step
_LOGITS_BYTES = 32 << 20  # most that the logits of a step take


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`value` may be infinite, or no number if the model computes none."""

    value: float
    scored_tokens: int
    windows: int


def perplexity(
    model: Model, tokens: Sequence[int], *, window: int = WINDOW, windows: int | None = None, threads: int
) -> Perplexity:
    """The model's perplexity on the first `windows` windows of (tokens,), of `window` tokens each; None: on all.

    Takes the memory of a context for one window, and of logits at most 32 MiB or one row. Raises ConfigError if there
    is no whole window, ExpertReadError if an expert of a paged model cannot be read, and what Context raises.
    """
    if window < 2 or (windows is not None and windows < 1):
        raise ConfigError("perplexity needs at least one window, and at least two tokens in it")
    if len(tokens) < window:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than one window of {window}")
    count = len(tokens) // window if windows is None else min(windows, len(tokens) // window)
    outputs = output_rows(model.vocab.n_tokens)
    params = ContextParams(window, sequences=1, batch_tokens=_ROWS, outputs=outputs, threads=threads)
    context = Context(model, params)
    try:
        scores = np.concatenate([_score(context, tokens[n * window : (n + 1) * window]) for n in range(count)])
    finally:
        context.close()
    with np.errstate(over="ignore"):
        return Perplexity(float(np.exp(scores.mean())), len(scores), count)


def output_rows(vocabulary: int) -> int:
    """Most rows with logits in one step."""
    return max(1, min(_ROWS, _LOGITS_BYTES // (4 * vocabulary)))


def _score(context: Context, window: Sequence[int]) -> npt.NDArray[np.float64]:
    """The negative log probabilities of the tokens of the window's second half, (tokens,)."""
    first, end = len(window) // 2 - 1, len(window) - 1  # the rows that foretell them
    batch, scores = Batch(_ROWS), list[float]()
    context.clear()
    for start in range(0, first, _ROWS):
        rows = window[start : min(start + _ROWS, first)]
        batch.clear()
        batch.extend(rows, start, 0, outputs=0)
        context.decode(batch)
    for start in range(first, end, context.params.outputs):
        rows = window[start : min(start + context.params.outputs, end)]
        batch.clear()
        batch.extend(rows, start, 0, outputs=len(rows))
        context.decode(batch)
        scores += [_surprise(context.logits(row), window[start + row + 1]) for row in range(len(rows))]
    return np.array(scores)


def _surprise(logits: npt.NDArray[np.float32], token: int) -> float:
    """The negative log probability of `token`."""
    with np.errstate(invalid="ignore"):
        values = logits.astype(np.float64)
        values -= values.max()
        return float(np.log(np.exp(values).sum()) - values[token])
