"""How long steps of some widths take, measured before a model serves."""

from __future__ import annotations

import time

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context

_WIDTHS = (1, 2, 4, 8, 16)
_READING_WIDTHS = (*_WIDTHS, 64)
_ROUNDS = 3  # the first touches memory for the first time


def measure_steps(context: Context, most_s: float = 1.0, *, every_row: bool = True) -> dict[int, float]:
    """Seconds by rows, for an empty context, which is left empty. Logits are computed of every row, or of the last
    alone. Widths of more rows than it has outputs for are left out, as are those that `most_s` seconds do not suffice
    for; one row is always measured.

    On the thread that will compute the steps: OpenMP keeps threads for every thread that it served, and makes all of
    them wait in a slower way once they are more than the processors.

    Raises BackendError.
    """
    widths = _WIDTHS if every_row else _READING_WIDTHS
    batch = Batch(max(widths))
    found: dict[int, float] = {}
    ends_s = time.perf_counter() + most_s
    for width in widths:
        outputs = width if every_row else 1
        if outputs > context.params.outputs or (
            found and time.perf_counter() + 2 * max(found.values()) * _ROUNDS > ends_s
        ):
            break
        for turn in range(_ROUNDS):
            batch.clear()
            batch.extend(range(width), 0, 0, outputs=outputs)
            started = time.perf_counter()
            context.decode(batch)
            seconds = time.perf_counter() - started
            context.remove(0)
            if turn:
                found[width] = min(seconds, found.get(width, seconds))
    return found
