"""The largest haystack that fits: bisection, with guesses that make it short, and what grows so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

REACH = 16


def largest_that_fits(count: Callable[[int], int], limit: int, smallest: int) -> int:
    """The largest size from `smallest` on whose count is within a limit.

    Counting the tokens of a long prompt takes a while, and they grow almost evenly with the size:
    straight lines between counts find the place in a few steps. Every third step halves what is
    left, so that no unevenness makes many of them.

    Args:
        count: tokens of a size; one more unit may in rare cases make them fewer.
        limit: the most tokens.
        smallest: a size whose count is within the limit.

    Returns:
        A size that fits, and that reaches the limit or is followed by one that does not fit.
    """
    fits, fits_count = smallest, count(smallest)
    start, start_count = fits, fits_count
    # Until something does not fit, go on along the line so far, but not far from small sizes.
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
    """Keeps what an endless iterator gave, so that larger haystacks begin with smaller ones.

    Its iterator must not share a random generator with anything that draws later: what it gives
    must not depend on the sizes that are tried.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._given: list[T] = []

    def first(self, count: int) -> list[T]:
        """The first elements, always the same."""
        self._given += islice(self._source, max(0, count - len(self._given)))
        return self._given[:count]
