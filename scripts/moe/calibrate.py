"""Runs a dense model over a text and keeps what its feed-forward layers read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.engine.threads import default_threads
from moe.split import Floats
from tests.support.graph_tap import GraphTap

_ROWS = 128  # of a step
_WINDOW = 512  # tokens that see each other


def layer_inputs(path: Path, text: str, tokens: int, layers: int, progress: Callable[[str], None]) -> list[Floats]:
    """The normalised input of every layer's feed-forward part, (tokens, width) each, for the head of `text`.

    For architectures whose graph calls it "ffn_norm". Raises ValueError if the text is too short.
    """
    model, tap = Model(path), GraphTap(["ffn_norm"])
    context = Context(model, ContextParams(_WINDOW, 1, _ROWS, _ROWS, default_threads(), eval_callback=tap.callback))
    try:
        ids = model.vocab.tokenize(text, add_special=False, parse_special=False)[:tokens]
        if len(ids) < tokens:
            raise ValueError(f"the text to calibrate with has {len(ids)} tokens, {tokens} are wanted")
        batch = Batch(_ROWS)
        for start in range(0, tokens, _WINDOW):
            context.clear()
            for step in range(start, min(start + _WINDOW, tokens), _ROWS):
                batch.clear()
                rows = ids[step : min(step + _ROWS, start + _WINDOW)]
                batch.extend(rows, step - start, 0, outputs=len(rows))  # llama.cpp's last layer drops rows without
                context.decode(batch)
            progress(f"read {min(start + _WINDOW, tokens)} of {tokens} tokens")
    finally:
        context.close()
        model.close()
    seen = tap.take()
    return [seen[f"ffn_norm-{layer}"] for layer in range(layers)]
