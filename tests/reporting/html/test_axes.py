import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.reporting.html.axes import bytes_axis, length_axis, linear_axis, log_axis

sizes = st.floats(1e-6, 1e12)


def check(axis, values):
    assert axis.low <= min(values) * 1.001
    assert axis.high >= max(values) * 0.999
    assert 2 <= len(axis.ticks) <= 16
    places = [axis.share(tick) for tick in axis.ticks]
    assert places == sorted(set(places))
    assert all(0 <= axis.share(value) <= 1 for value in values)


@given(st.lists(sizes, min_size=1, max_size=5))
def test_every_value_fits(values):
    check(linear_axis("x", values), values)
    check(linear_axis("x", [-value for value in values], include=(0,)), [0.0])
    check(log_axis("x", values, str), values)


@given(st.lists(st.integers(1, 2**50), min_size=1, max_size=5))
def test_every_size_fits(values):
    check(bytes_axis("x", values), values)


def test_round_ticks():
    assert linear_axis("x", [3.0, 97.0], include=(0, 100)).ticks == (0, 25, 50, 75, 100)
    assert linear_axis("x", [0.0]).ticks == (-1, -0.5, 0, 0.5, 1)
    assert log_axis("x", [3, 40], str).ticks == (2, 5, 10, 20, 50)
    assert log_axis("x", [3, 40000], str).ticks == (1, 10, 100, 1000, 10000, 100000)
    axis = bytes_axis("x", [3 * 2**20, 5 * 2**20])
    assert [axis.write(tick) for tick in axis.ticks] == ["2 MiB", "4 MiB", "8 MiB"]


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([120.1, 120.4], ["120.1", "120.2", "120.3", "120.4"]),
        ([0.0, 10.0], ["0", "2.5", "5", "7.5", "10"]),
        ([0.9965, 0.9972], ["0.9964", "0.9966", "0.9968", "0.997", "0.9972"]),
        ([0, 4000], ["0", "1,000", "2,000", "3,000", "4,000"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(values, written):
    axis = linear_axis("x", values)
    assert [axis.write(tick) for tick in axis.ticks] == written


def test_lengths_are_named_where_there_is_room():
    axis = length_axis([131072, 4096, 7500, 8192])
    assert [axis.write(tick) for tick in axis.ticks] == ["4K", "7,500", "128K"]
    assert length_axis([4096]).share(4096) == pytest.approx(0.5)
