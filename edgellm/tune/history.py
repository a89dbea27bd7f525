"""A run's metrics, step by step, as the CSV file that OpenAI's jobs give."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgellm.models.files import write_atomic

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")

Row = dict[str, float]


class History:
    """One row a step, by number; a step done again after a crash replaces its row."""

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._rows: dict[int, Row] = {int(row["step"]): dict(row) for row in rows}

    def train(self, step: int, loss: float, accuracy: float) -> None:
        """What a step gave."""
        self._row(step).update(train_loss=loss, train_accuracy=accuracy)

    def validate(self, step: int, loss: float, accuracy: float) -> None:
        """What validation gave behind a step; 0: before the first."""
        self._row(step).update(valid_loss=loss, valid_mean_token_accuracy=accuracy)

    def last(self) -> Row:
        """The last step's row; empty if there is none."""
        return dict(self._rows[max(self._rows)]) if self._rows else {}

    @property
    def rows(self) -> list[Row]:
        """All rows, by step. Where nothing was measured, a key is missing."""
        return [self._rows[step] for step in sorted(self._rows)]

    def write(self, path: Path) -> None:
        """The CSV, whole or not at all. Raises OSError."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            writer.writerow([_cell(row.get(name)) for name in COLUMNS])
        write_atomic(path, text.getvalue().encode())

    def _row(self, step: int) -> Row:
        return self._rows.setdefault(step, {"step": step})


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(int(value)) if isinstance(value, int) else f"{value:.5f}"
