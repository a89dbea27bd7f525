"""The course of a run's loss: its table of metrics, smoothed, and drawn as an SVG picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edgellm.errors import StorageError

Points = tuple[tuple[int, float], ...]  # (step, loss), steps ascending

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 48, 48  # margins of the plot
_SMOOTHING = 0.9
_TICKS = 6
_TITLE_MAX = 72  # characters
LIGHT = {"paper": "#ffffff", "ink": "#24292f", "faint": "#d0d7de", "train": "#1f6feb", "valid": "#bc4c00"}
DARK = {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#30363d", "train": "#58a6ff", "valid": "#f0883e"}


def _colours(of: dict[str, str]) -> str:
    """No variables, which many programs that show SVG do not know."""
    return (
        f".paper{{fill:{of['paper']}}} text{{fill:{of['ink']}}} .grid{{stroke:{of['faint']}}} "
        f".raw,.smooth{{stroke:{of['train']}}} .between{{stroke:{of['valid']}}} .valid{{fill:{of['valid']}}}"
    )


_STYLE = f"""
text{{font:13px system-ui,sans-serif}} .title{{font-size:16px;font-weight:600}} .grid{{stroke-width:1}}
.raw,.smooth,.between{{fill:none;stroke-linejoin:round}} .raw{{stroke-width:1;opacity:.35}}
.smooth{{stroke-width:2.5}} .between{{stroke-width:1.5;stroke-dasharray:4 3}}
{_colours(LIGHT)}
@media (prefers-color-scheme:dark){{{_colours(DARK)}}}
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean loss of an answer token, in nats. Steps that have none are left out."""

    train: Points
    validation: Points


def read_curve(path: Path) -> Curve:
    """The losses of a table of step metrics (CSV with step, train_loss, valid_loss). Raises StorageError."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return Curve(_column(rows, "train_loss"), _column(rows, "valid_loss"))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is no table of step metrics: {error}") from None


def _column(rows: Iterable[dict[str, str]], name: str) -> Points:
    found = [(int(row["step"]), float(row[name])) for row in rows if row[name] != ""]
    return tuple(sorted(point for point in found if math.isfinite(point[1])))


def smoothed(values: Iterable[float], weight: float = _SMOOTHING) -> list[float]:
    """Exponential moving average that begins at the first value; the bias of its start is divided out."""
    found, mean, seen = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        found.append(mean / seen)
    return found


def ticks(low: float, high: float, most: int = _TICKS, *, whole: bool = False) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, evenly over low..high; `whole`: integers only.

    There is at least one, unless `whole` finds no integer. Raises ValueError unless low < high and most >= 4.
    """
    if not low < high or most < 4:
        raise ValueError("an axis needs two ends and room for four ticks")
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    size = max(size, 1.0) if whole else size
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [round(index * size, 12) for index in range(first, last + 1)]


def draw_curve(curve: Curve, title: str) -> str:
    """An SVG document, WIDTH x HEIGHT, legible on light and on dark screens. Raises ValueError without any point."""
    plot = _Plot(curve)
    words = escape(_shortened("".join(c if c.isprintable() else "\ufffd" for c in title)))
    raw = [(step, loss) for step, loss in curve.train]
    smooth = list(zip((step for step, _ in raw), smoothed(loss for _, loss in raw), strict=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" aria-label="{words}"><title>{words}</title><style>{_STYLE}</style>',
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="26">{words}</text>',
        *plot.axes(),
        plot.line("raw", raw),
        plot.line("smooth", smooth),
        plot.line("between", curve.validation),
        *plot.dots("valid", curve.validation),
        *_legend(bool(raw), bool(curve.validation)),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _shortened(title: str) -> str:
    return title if len(title) <= _TITLE_MAX else title[: _TITLE_MAX - 1] + "\u2026"


class _Plot:
    """Where steps and losses lie on the picture, in its units from the top left."""

    def __init__(self, curve: Curve) -> None:
        points = curve.train + curve.validation
        if not points:
            raise ValueError("there is nothing to draw")
        losses = [loss for _, loss in points]
        self.last = max(1, *(step for step, _ in points))
        room = 0.05 * (max(losses) - min(losses)) or 0.05 * abs(losses[0]) or 1.0
        self.low, self.high = min(losses) - room, max(losses) + room

    def place(self, step: float, loss: float) -> tuple[float, float]:
        x = LEFT + step / self.last * (WIDTH - LEFT - RIGHT)
        y = TOP + (self.high - loss) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 2), round(y, 2)

    def axes(self) -> Iterable[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for loss in ticks(self.low, self.high):
            _, y = self.place(0, loss)
            yield f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>'
            yield f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{loss:g}</text>'
        for step in ticks(0, self.last, whole=True):
            x, _ = self.place(step, self.low)
            yield f'<line class="grid" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}"/>'
            yield f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{step:,.0f}</text>'
        yield f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end">step</text>'

    def line(self, kind: str, points: Sequence[tuple[int, float]]) -> str:
        if not points:
            return ""
        places = " ".join(f"{x},{y}" for x, y in (self.place(*point) for point in points))
        return f'<polyline class="{kind}" points="{places}"/>'

    def dots(self, kind: str, points: Points) -> Iterable[str]:
        for step, loss in points:
            x, y = self.place(step, loss)
            yield f'<circle class="{kind}" cx="{x}" cy="{y}" r="4"><title>step {step}: {loss:.4g}</title></circle>'


def _legend(train: bool, validation: bool) -> Iterable[str]:
    x, y = LEFT, HEIGHT - 14
    if train:
        yield f'<polyline class="smooth" points="{x},{y} {x + 24},{y}"/><text x="{x + 30}" y="{y + 4}">training</text>'
    if validation:
        x += 120
        yield f'<circle class="valid" cx="{x + 12}" cy="{y}" r="4"/><text x="{x + 24}" y="{y + 4}">validation</text>'
