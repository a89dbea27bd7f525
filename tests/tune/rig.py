"""llama.cpp's own logits, and how far others are from them. Needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Adapter, Model

TEXT = b"hello world, the user is in the name of you and of the world; true is null, false is hello"


def true_logits(path: Path, tokens: list[int], adapter: Path | None = None) -> Tensor:
    """What llama.cpp computes for each of `tokens`, (tokens, vocabulary)."""
    model = Model(path)
    context = Context(
        model,
        ContextParams(context_tokens=512, sequences=1, batch_tokens=512, outputs=512, threads=2, flash_attention="off"),
    )
    loaded = Adapter(model, adapter) if adapter else None
    if loaded:
        context.set_adapters([(loaded, 1.0)])
    batch = Batch(512)
    batch.extend(tokens, 0, 0, outputs=len(tokens))
    context.decode(batch)
    logits = np.stack([context.logits(row).copy() for row in range(len(tokens))])
    context.close()
    if loaded:
        loaded.close()
    model.close()
    return torch.from_numpy(logits)


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """(the mean KL divergence of `found` from `expected`, how often both hold the same token likeliest)."""
    p, q = expected.log_softmax(1), found.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).float().mean())
