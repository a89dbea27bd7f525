"""Log-probabilities of tokens, from a row of logits."""

from __future__ import annotations

import numpy as np

from edgellm.backend.context import Floats
from edgellm.engine.types import TokenLogprob


def token_logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """The log-probability of `token` and of the `top` likeliest tokens under softmax(logits), logits (vocabulary,)."""
    peak = float(logits.max())
    normaliser = peak + float(np.log(np.exp(logits - peak, dtype=np.float32).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if top > 0:
        candidates = np.argpartition(logits, -top)[-top:]
        ordered = candidates[np.argsort(-logits[candidates], kind="stable")]
        best = tuple((int(i), float(logits[i]) - normaliser) for i in ordered)
    return TokenLogprob(token, float(logits[token]) - normaliser, best)
