"""Axes: where values lie between the ends of a plot, and which of them are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtpurbo.formats import short_bytes, short_length


@dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        name: what is measured, with its unit.
        low: the value at the beginning.
        high: the value at the end.
        ticks: values that are named.
        write: how they are written.
        logarithmic: whether equal factors are equally long.
    """

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the beginning, 1 at the end, never beyond."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear_axis(
    name: str,
    values: Sequence[float],
    write: Callable[[float], str] | None = None,
    include: Sequence[float] = (),
    num_ticks: int = 5,
) -> Axis:
    """An axis with round numbers around some values.

    Args:
        name: what is measured.
        values: what has to fit.
        write: how a tick is written; with as many digits as tell ticks apart if None.
        include: more that has to fit, such as 0.
        num_ticks: about how many ticks.
    """
    low, high = min((*values, *include)), max((*values, *include))
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = 0.1 * abs(low) or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / (num_ticks - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(step * count, 12) for count in range(first, last + 1))
    # Ticks are round and end in zeros that are left out; values between them need two digits more.
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + 2
    return Axis(name, ticks[0], ticks[-1], ticks, write or (lambda value: _short(value, digits)))


def log_axis(name: str, values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """A logarithmic axis around positive values: ticks at 1, 2, 5 or at powers of ten only."""
    low, high = min(values), max(values)
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = [factor * 10.0**decade for decade in decades for factor in factors]
    low = max(tick for tick in every if tick <= low * 1.0001)
    high = min((tick for tick in every if tick >= high / 1.0001), default=high)
    ticks = tuple(tick for tick in every if low <= tick <= high)
    ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return Axis(name, low, high, ticks, write, logarithmic=True)


def bytes_axis(name: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis of bytes, with ticks at powers of two."""
    powers = range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)
    if len(powers) < 3:
        powers = range(powers[0] - 1, powers[-1] + 2)
    step = max(1, math.ceil(len(powers) / 7))
    ticks = tuple(2.0**power for power in powers[::step])
    low, high = 2.0 ** powers[0], 2.0 ** powers[-1]
    return Axis(name, low, high, ticks, lambda value: short_bytes(value).replace(".0", ""), True)


def length_axis(lengths: Sequence[int], name: str = "tokens of context") -> Axis:
    """A logarithmic axis of context lengths, with ticks where something was measured."""
    ordered = sorted(set(lengths))
    low, high = float(ordered[0]), float(ordered[-1])
    if low == high:
        low, high = low / 2, high * 2
    axis = Axis(name, low, high, (), lambda value: short_length(round(value)), logarithmic=True)
    ticks: list[float] = []
    for length in ordered:
        # Names nearer to each other than this would overlap.
        if not ticks or axis.share(length) - axis.share(ticks[-1]) > 0.11:
            ticks.append(float(length))
    return Axis(name, low, high, tuple(ticks), axis.write, logarithmic=True)


def _short(value: float, digits: int) -> str:
    written = f"{value:,.{digits}f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)
