"""Search for the largest haystack that fits a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

REACH = 16


def largest_that_fits(count: Callable[[int], int], limit: int, smallest: int) -> int:
    """Returns the largest size from `smallest` on whose count is within a limit.

    Counting the tokens of a long prompt is slow, and their number is almost linear in the size, so linear
    interpolation needs few steps. Every third step bisects, which bounds the number of steps.

    Args:
        count: returns the tokens of a size; in rare cases, a larger size has fewer.
        limit: maximum number of tokens.
        smallest: size whose count is within the limit.

    Returns:
        Size that fits, and that reaches the limit or is one below a size that does not fit.
    """
    fits, fits_count = smallest, count(smallest)
    start, start_count = fits, fits_count
    # Extrapolate until a size does not fit, at most by a factor of `REACH`.
    too_large, too_many = 2 * (fits + 1), count(2 * (fits + 1))
    while too_many <= limit:
        fits, fits_count = too_large, too_many
        slope = (fits_count - start_count) / (fits - start)
        reach = (limit - fits_count) / slope if slope > 0 else fits
        too_large = fits + 1 + min(int(1.01 * reach), REACH * fits)
        too_many = count(too_large)
    step = 0
    while too_large - fits > 1 and fits_count < limit:
        step += 1
        share = (limit - fits_count) / (too_many - fits_count)
        if step % 3 == 0:
            share = 1 / 2
        guess = fits + min(max(round(share * (too_large - fits)), 1), too_large - fits - 1)
        guess_count = count(guess)
        if guess_count <= limit:
            fits, fits_count = guess, guess_count
        else:
            too_large, too_many = guess, guess_count
    return fits


class Stream(Generic[T]):
    """Buffered prefix of an endless iterator, so that larger haystacks begin with smaller ones.

    The iterator must not share a random generator with later draws: its elements must not depend on the
    sizes that the search tries.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._buffer: list[T] = []

    def first(self, count: int) -> list[T]:
        """Returns the first elements, which are the same in every call."""
        self._buffer += islice(self._source, max(0, count - len(self._buffer)))
        return self._buffer[:count]
