"""Logits do not depend on how many rows a step has: to the last bit, beyond 512 cells too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.backend.packing import packing_kernels
from tests.support.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.skipif(packing_kernels() is None, reason="nothing is hooked into llama.cpp here")
ROWS = 12


def _rows(context: Context, start: int, width: int) -> np.ndarray:
    """Logits of ROWS tokens after `start`, computed `width` at a time."""
    batch = Batch(ROWS)
    found = []
    for first in range(0, ROWS, width):
        batch.clear()
        batch.extend(range(first, first + width), start + first, 0, outputs=width)
        context.decode(batch)
        found += [context.logits(row).copy() for row in range(width)]
    context.remove(0, start)
    return np.array(found)


@pytest.mark.parametrize("cells", [40, 700, 1500])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_alone_and_among_others(tmp_path: Path, cells: int, threads: int) -> None:
    # Four heads and at most two threads: with fewer heads the path for one row would be left to ggml.
    path = write_tiny_llama(tmp_path / "tiny.gguf", weights="q8_0", context=4096)
    model = Model(path, mapped=False, packed=True)
    params = ContextParams(
        context_tokens=2048, sequences=1, batch_tokens=512, outputs=ROWS, threads=threads, flash_attention="on"
    )
    context = Context(model, params)
    batch = Batch(512)
    for start in range(0, cells, 500):
        batch.clear()
        batch.extend([token % 256 for token in range(start, min(cells, start + 500))], start, 0, outputs=1)
        context.decode(batch)
    alone = _rows(context, cells, 1)
    for width in (2, 3, 4, 6, 12):
        np.testing.assert_array_equal(_rows(context, cells, width), alone)
    context.close()
    model.close()
