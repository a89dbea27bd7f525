"""How long a step takes by its number of rows: measured on this machine with this model, and followed while running.

A curve over some widths, straight between them, times a scale. The scale follows what changes for all widths together
(a longer context, another process that computes); the curve's shape follows slowly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)
"""Rows at which the curve is known."""

_SLOPE = 0.35  # time of a further row in that of the first, until it is measured
_CAUTIOUS_SLOPE = 0.9  # where nothing was measured at start
_SCALE_RATE = 0.1
_SHAPE_RATE = 0.01
_ANSWERS = 32  # steps with more rows read prompts, and say nothing about the scale of those that do not
_ENOUGH = 4  # steps of a width, until its time is no mere assumption
_BELIEVED = 2.0  # a step that took more times as long as foreseen, or as much shorter, says no more than this


class StepCosts:
    """Seconds by rows."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """`measured`: seconds of steps of some of WIDTHS, 1 among them; None: nothing is known yet."""
        self.known = bool(measured)
        slope = _SLOPE if measured else _CAUTIOUS_SLOPE
        seconds = dict(measured or {1: 1.0})
        known = sorted(seconds)
        self._curve: list[float] = []
        for width in WIDTHS:  # straight between widths that are known, and on from the last of them
            beyond = seconds[known[-1]] + seconds[1] * slope * (width - known[-1])
            found = float(np.interp(width, known, [seconds[one] for one in known])) if width <= known[-1] else beyond
            self._curve.append(max([found, *self._curve[-1:]]))  # more rows never take less time
        self._scale = 1.0
        self._seen = [_ENOUGH if width in seconds and measured else 0 for width in WIDTHS]

    def uncertain(self, rows: int) -> bool:
        """Whether steps of about so many rows have hardly been seen."""
        lower, part = _between(rows)
        return self._seen[lower + round(part)] < _ENOUGH

    def seconds(self, rows: int) -> float:
        """Of a step of `rows` rows, at least 1."""
        lower, part = _between(rows)
        curve = self._curve
        return self._scale * (curve[lower] + part * (curve[lower + 1] - curve[lower]))

    def observe(self, rows: int, seconds: float) -> None:
        """A step took so long."""
        if not self.known:
            self._scale, self.known = seconds / self.seconds(rows), True
            return
        ratio = min(_BELIEVED, max(1 / _BELIEVED, seconds / self.seconds(rows)))
        if rows <= _ANSWERS:
            self._scale *= 1 + _SCALE_RATE * (ratio - 1)
        lower, part = _between(rows)
        self._seen[lower + round(part)] += 1
        curve = self._curve
        curve[lower] *= 1 + _SHAPE_RATE * (1 - part) * (ratio - 1)
        curve[lower + 1] *= 1 + _SHAPE_RATE * part * (ratio - 1)
        for place in range(lower, 0, -1):  # more rows never take less time
            curve[place - 1] = min(curve[place - 1], curve[place])
        for place in range(lower, len(curve) - 1):
            curve[place + 1] = max(curve[place + 1], curve[place])

    def measured(self) -> dict[int, float]:
        """The curve as it is now, for another start: of one row, and of widths whose time is no mere assumption."""
        widths = zip(WIDTHS, self._curve, self._seen, strict=True)
        return {width: self._scale * seconds for width, seconds, seen in widths if width == 1 or seen >= _ENOUGH}


def _between(rows: int) -> tuple[int, float]:
    """The place in WIDTHS below `rows`, and which part of the way to the next one `rows` is."""
    lower = min(bisect_right(WIDTHS, rows) - 1, len(WIDTHS) - 2)
    return lower, (rows - WIDTHS[lower]) / (WIDTHS[lower + 1] - WIDTHS[lower])
