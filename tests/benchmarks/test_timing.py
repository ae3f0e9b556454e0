import time

import torch

from rtpurbo.benchmarks.timing import Clock, clock_of, measure, replayed
from tests.benchmarks.support import FakeClock


def test_fast_calls_warm_up_and_are_repeated():
    clock = FakeClock([5.0])
    found = measure(lambda: None, clock, 9)
    assert clock.repeats == [9, 9]
    assert (found.milliseconds, found.repeats) == (5.0, 9)
    assert found.milliseconds_p10 < found.milliseconds < found.milliseconds_p90


def test_few_repeats_of_long_calls_and_none_of_slow_ones():
    clock = FakeClock([600.0])
    assert measure(lambda: None, clock, 20).repeats == 5
    assert clock.repeats == [5]
    found = measure(lambda: None, FakeClock([4000.0]), 20)
    assert (found.milliseconds, found.milliseconds_p10, found.repeats) == (4000.0, 4000.0, 1)


def test_memory_beyond_inputs_and_result_is_scratch():
    found = measure(lambda: None, FakeClock(peak=1000), 3, result_bytes=150)
    assert (found.peak_memory_bytes, found.scratch_bytes) == (1000, 750)
    assert measure(lambda: None, FakeClock(), 3).scratch_bytes is None


def test_a_call_that_does_its_work_several_times():
    found = measure(lambda: None, FakeClock([6.0]), 3).per(2)
    assert found.milliseconds == 1.0


def test_the_clock_on_the_wall():
    clock = clock_of(torch.device("cpu"))
    assert type(clock) is Clock
    before = time.perf_counter()
    measured = clock.first(lambda: time.sleep(0.01))
    assert 10 <= measured <= 1000 * (time.perf_counter() - before)
    assert len(clock.times(lambda: None, 3)) == 3
    assert clock.peak_memory() is None


def test_calls_in_a_row_are_one_call():
    seen = []
    replayed([lambda: seen.append(1), lambda: seen.append(2)], torch.device("cpu"))()
    assert seen == [1, 2]
