from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.data.fitting import largest_that_fits


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    frame=st.integers(0, 500),
    smallest=st.integers(0, 30),
    room=st.integers(0, 5000),
)
def test_the_next_size_does_not_fit(steps, frame, smallest, room):
    steps = [*steps, 1]  # something must grow

    def count(size):
        whole, rest = divmod(size, len(steps))
        return frame + whole * sum(steps) + sum(steps[:rest])

    limit = count(smallest) + room
    size = largest_that_fits(count, limit, smallest)
    assert count(size) <= limit
    assert count(size) == limit or count(size + 1) > limit


def test_the_number_of_tokenizations_is_small():
    counted = []

    def count(size):
        counted.append(size)
        return 300 + 7 * size + size % 5

    assert count(largest_that_fits(count, 130_000, 20)) <= 130_000
    assert len(counted) < 12
