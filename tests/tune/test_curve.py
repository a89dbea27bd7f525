"""The loss curve: what is read from the metrics, and where it lies on the picture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import StorageError
from edgellm.tune.curve import (
    BOTTOM,
    DARK,
    HEIGHT,
    LEFT,
    LIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    draw_curve,
    read_curve,
    smoothed,
    ticks,
)

HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
losses = st.floats(min_value=-1e6, max_value=1e6)
points = st.dictionaries(st.integers(1, 10_000), losses, min_size=1, max_size=30).map(
    lambda d: tuple(sorted(d.items()))
)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    """The points of the drawn line of that class; the legend's is not there."""
    lines = [line for line in parsed(svg).iter() if line.get("class") == kind and line.get("points")]
    return [tuple(map(float, pair.split(","))) for pair in lines[0].get("points", "").split()]  # type: ignore[misc]


def dots(svg: str) -> list[tuple[float, float]]:
    found = [dot for dot in parsed(svg).iter() if dot.get("class") == "valid" and len(dot)]
    return [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in found]


def test_the_points_lie_where_the_data_says() -> None:
    train = tuple((step, 3 - 0.02 * step + (0.3 if step % 2 else 0)) for step in range(1, 101))
    svg = draw_curve(Curve(train, ((50, 2.1), (100, 1.2))), "a run")
    labels = [text for text in parsed(svg).iter() if text.tag.endswith("text") and text.get("text-anchor") == "end"]
    ys = {float(text.text or ""): float(text.get("y", "")) - 4 for text in labels[:-1]}
    low, high = min(ys), max(ys)  # the axis itself tells where a loss lies

    def y(loss: float) -> float:
        return ys[low] + (loss - low) / (high - low) * (ys[high] - ys[low])

    def x(step: float) -> float:
        return LEFT + step / 100 * (WIDTH - LEFT - RIGHT)

    assert len(ys) >= 3
    assert ys[low] > ys[high]
    raw = places(svg, "raw")
    assert [p[0] for p in raw] == pytest.approx([x(step) for step, _ in train], abs=0.01)
    assert [p[1] for p in raw] == pytest.approx([y(loss) for _, loss in train], abs=0.05)
    smooth = smoothed(loss for _, loss in train)
    assert [p[1] for p in places(svg, "smooth")] == pytest.approx([y(loss) for loss in smooth], abs=0.05)
    assert dots(svg) == [pytest.approx((x(50), y(2.1)), abs=0.05), pytest.approx((x(100), y(1.2)), abs=0.05)]


@given(points, points, st.text(max_size=200))
def test_any_curve_is_sound_xml_within_its_plot(train, validation, title) -> None:
    svg = draw_curve(Curve(train, validation), title)
    drawn = places(svg, "raw") + places(svg, "smooth") + dots(svg)
    assert len(drawn) == 2 * len(train) + len(validation)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in drawn)


def test_titles_are_escaped_and_shortened() -> None:
    svg = draw_curve(Curve(((1, 1.0),), ()), '<b>&"' + "long " * 50 + "\0\ud800")
    title = parsed(svg).findtext("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.startswith('<b>&"long')
    assert title.endswith("…")


def test_light_and_dark() -> None:
    """Text and paper differ clearly in both: WCAG's contrast is at least 4.5."""
    style = parsed(draw_curve(Curve(((1, 1.0),), ()), "t")).findtext("{http://www.w3.org/2000/svg}style") or ""
    light, dark = style.split("@media (prefers-color-scheme:dark)")

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for part, colours in ((light, LIGHT), (dark, DARK)):
        assert set(re.findall(r"#\w{6}", part)) == set(colours.values())
        paper = luminance(colours["paper"][1:])
        for name in ("ink", "train", "valid"):
            low, high = sorted((paper, luminance(colours[name][1:])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colours)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="nothing"):
        draw_curve(Curve((), ()), "t")


@given(st.floats(-1e3, 1e3), st.floats(min_value=1e-3, max_value=1e6), st.integers(4, 12))
def test_ticks_are_round_and_within(lengths, length, most) -> None:
    low = lengths * length
    high = low + length
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    assert all(low - 1e-6 * length <= tick <= high + 1e-6 * length for tick in found)
    if len(found) > 1:
        size = (found[-1] - found[0]) / (len(found) - 1)
        first = size / 10 ** math.floor(math.log10(size * (1 + 1e-9)))
        assert min(abs(first - fine) for fine in (1, 2, 5)) < 1e-3


def test_ticks() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert ticks(0, 1234, whole=True) == [0, 500, 1000]
    with pytest.raises(ValueError, match="two ends"):
        ticks(1, 1)


def test_smoothing_begins_at_the_first_value() -> None:
    assert smoothed([]) == []
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert smoothed([1.0, 3.0], 0.5) == pytest.approx([1, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_metrics_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + "0,,,3.5,0.1\n1,3.0,0.2,,\n2,nan,0.3,,\n3,2.5,0.3,2.75,0.4\n")
    assert read_curve(path) == Curve(((1, 3.0), (3, 2.5)), ((0, 3.5), (3, 2.75)))


@pytest.mark.parametrize("text", ["step,loss\n1,2\n", HEADER + "one,2,,,\n", HEADER + "1\n", HEADER + "1,much,,,\n"])
def test_what_is_no_table_of_metrics(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(StorageError, match="no table of step metrics"):
        read_curve(path)
    with pytest.raises(StorageError):
        read_curve(tmp_path / "nothing.csv")
