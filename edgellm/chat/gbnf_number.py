"""Numbers between bounds as GBNF: exact, digit by digit, in decimal."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from edgellm.chat.gbnf import Inexpressible, alternatives

_DIGITS = 18  # of an integer without an upper bound
_MAX_DIGITS = 40  # of a bound
_FREE = "[0-9]{0,15}"
_FREE_SOME = "[0-9]{1,15}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """`low` <= x <= `high`, or < where `*_open`; None is unbounded."""

    low: Decimal | None = None
    low_open: bool = False
    high: Decimal | None = None
    high_open: bool = False

    def contains(self, value: Decimal) -> bool:
        """Whether a number lies within."""
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        return self.high is None or not (value > self.high or (self.high_open and value == self.high))


def integers(bounds: Bounds) -> str:
    """A rule body for the integers within the bounds. Raises Inexpressible if there are none."""
    low = high = None
    if bounds.low is not None:
        _check(bounds.low)
        low = int(bounds.low.to_integral_value(ROUND_CEILING))
        low += bounds.low_open and low == bounds.low
    if bounds.high is not None:
        _check(bounds.high)
        high = int(bounds.high.to_integral_value(ROUND_FLOOR))
        high -= bounds.high_open and high == bounds.high
    if low is not None and high is not None and low > high:
        raise Inexpressible("the bounds leave no integer")
    options = []
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        options.append(f'"-" ({_naturals(least, None if low is None else -low)})')
    if high is None or high >= 0:
        options.append(_naturals(max(low or 0, 0), high))
    return alternatives(options)


def numbers(bounds: Bounds) -> str:
    """A rule body for the decimal numbers within the bounds, without exponents. Raises Inexpressible for none."""
    low, high = bounds.low, bounds.high
    for bound in (low, high):
        if bound is not None:
            _check(bound)
    if low is not None and high is not None and (low > high or (low == high and not bounds.contains(low))):
        raise Inexpressible("the bounds leave no number")
    zero = Decimal(0)
    options: list[str] = []
    if low is None or low < 0:  # the negative part, by its magnitude
        reaches_zero = high is None or high > 0 or (high == 0 and not bounds.high_open)
        least, least_open = (zero, not reaches_zero) if high is None or high >= 0 else (-high, bounds.high_open)
        options += [
            f'"-" ({option})'
            for option in _magnitudes(least, least_open, None if low is None else -low, bounds.low_open)
        ]
    if high is None or high > 0 or (high == 0 and not bounds.high_open):
        least, least_open = (zero, False) if low is None or low < 0 else (low, bounds.low_open)
        options += _magnitudes(least, least_open, high, bounds.high_open)
    return alternatives(options)


def _check(bound: Decimal) -> None:
    if not bound.is_finite() or len(format(bound, "f")) > _MAX_DIGITS:
        raise Inexpressible(f"a bound of more than {_MAX_DIGITS} digits")


def _naturals(low: int, high: int | None) -> str:
    """Alternatives for `low` .. `high`, both 0 or more, without leading zeros."""
    first = str(low)
    last = "9" * max(_DIGITS, len(first)) if high is None else str(high)
    options: list[str] = []
    for length in range(len(first), len(last) + 1):
        lower = first if length == len(first) else "1" + "0" * (length - 1)
        upper = last if length == len(last) else "9" * length
        if lower == "0" and length == 1 and upper != "0":
            options += ['"0"', *_same_length("1", upper)]
        else:
            options += _same_length(lower, upper)
    return alternatives(options)


def _same_length(low: str, high: str) -> list[str]:
    """Alternatives for the digit strings from `low` to `high`, which are equally long."""
    if low == high:
        return [f'"{low}"']
    if low == "0" * len(low) and high == "9" * len(high):
        return [_digits(len(low))]
    if low == "1" + "0" * (len(low) - 1) and high == "9" * len(high):
        return [f"[1-9] {_digits(len(low) - 1)}".rstrip()]
    if len(low) == 1:
        return [f"[{low}-{high}]"]
    if low[0] == high[0]:
        return [f'"{low[0]}" ({alternatives(_same_length(low[1:], high[1:]))})']
    rest = len(low) - 1
    start, end = int(low[0]), int(high[0])
    options: list[str] = []
    if low[1:] != "0" * rest:
        options.append(f'"{start}" ({alternatives(_same_length(low[1:], "9" * rest))})')
        start += 1
    tail = None
    if high[1:] != "9" * rest:
        tail = f'"{end}" ({alternatives(_same_length("0" * rest, high[1:]))})'
        end -= 1
    if start <= end:
        options.append(f"[{start}-{end}] {_digits(rest)}")
    return options + ([tail] if tail else [])


def _digits(count: int) -> str:
    return "" if count == 0 else "[0-9]" if count == 1 else f"[0-9]{{{count}}}"


def _split(value: Decimal) -> tuple[int, str]:
    """Integer part and fraction digits (without trailing zeros) of a value of 0 or more."""
    whole, _, fraction = format(value, "f").partition(".")
    return int(whole), fraction.rstrip("0")


def _magnitudes(low: Decimal, low_open: bool, high: Decimal | None, high_open: bool) -> list[str]:
    """Alternatives for the decimal numbers from `low` to `high`, both 0 or more."""
    first, first_digits = _split(low)
    lower = (first_digits, low_open)
    if high is None:
        return [*_with_fraction(str(first), lower, None), f'({_naturals(first + 1, None)}) ("." {_FREE_SOME})?']
    last, last_digits = _split(high)
    upper = (last_digits, high_open)
    if first == last:
        return _with_fraction(str(first), lower, upper)
    options = _with_fraction(str(first), lower, None)
    if first + 1 <= last - 1:
        options.append(f'({_naturals(first + 1, last - 1)}) ("." {_FREE_SOME})?')
    return options + _with_fraction(str(last), None, upper)


_Edge = tuple[str, bool] | None
"""Fraction digits still to be compared with, and whether equality is ruled out. None: no longer at this edge."""


def _with_fraction(whole: str, lower: _Edge, upper: _Edge) -> list[str]:
    may_end, more = _fraction(lower, upper)
    options = [f'"{whole}"'] if may_end else []
    if more:
        options.append(f'"{whole}." ({alternatives(more)})')
    return options


def _fraction(lower: _Edge, upper: _Edge) -> tuple[bool, list[str]]:
    """What digits may follow: whether none may, and the alternatives of one or more."""
    if lower == ("", False):
        lower = None  # anything is at least zero
    if lower is None and upper is None:
        return True, [_FREE_SOME]
    if upper is not None and upper[0] == "":  # only zeros are left
        if upper[1] or lower is not None:
            return False, []
        return True, ['"0"{1,15}']
    if lower == ("", True) and upper is None:  # anything but zeros
        return False, [f'"0"{{0,15}} [1-9] {_FREE}']
    may_end = lower is None
    options = []
    start = int(lower[0][:1] or "0") if lower else 0
    end = int(upper[0][0]) if upper else 9
    for digit in range(start, end + 1):
        below = (lower[0][1:], lower[1]) if lower and digit == start else None
        above = (upper[0][1:], upper[1]) if upper and digit == end else None
        nothing, more = _fraction(below, above)
        if more:
            options.append(f'"{digit}" ({alternatives(more)})' + ("?" if nothing else ""))
        elif nothing:
            options.append(f'"{digit}"')
    return may_end, options
