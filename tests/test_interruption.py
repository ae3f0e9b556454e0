"""Signals: a step is finished first, and only the second signal is impatient."""

import os
import signal
import threading
import time

import pytest

from rtpurbo.interruption import (
    StoppedBySignalError,
    steps_undisturbed,
    stop_requested,
    stopping_cleanly,
)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_steps_stops_at_once(number, code):
    stopped = pytest.raises(StoppedBySignalError, match=r"stopped by SIG.*--resume")
    with stopped as caught, stopping_cleanly():
        try:
            send(number)
        except Exception:  # what libraries catch on the way
            pytest.fail("an interruption must pass through")
    assert caught.value.exit_code == code


def test_a_signal_waits_for_the_end_of_a_step():
    done = []

    def work():
        for step in range(1, 4):
            if step == 2:
                send(signal.SIGTERM)
            done.append(step)
            if number := stop_requested():
                raise StoppedBySignalError(number, f"after step {step} of stage1")

    stopped = pytest.raises(StoppedBySignalError, match="after step 2 of stage1")
    with stopped, stopping_cleanly(), steps_undisturbed():
        work()
    assert done == [1, 2]
    assert stop_requested() is None


def test_a_signal_that_no_step_handled_stops_at_the_end():
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), steps_undisturbed():
        send(signal.SIGTERM)
    assert stop_requested() is None


def test_within_a_step_a_smaller_one_does_not_end_it():
    reached = []
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), steps_undisturbed():
        with steps_undisturbed():
            send(signal.SIGTERM)
        reached.append(stop_requested())
    assert reached == [signal.SIGTERM]


def test_a_time_limit_stops_like_sigterm():
    with pytest.raises(StoppedBySignalError, match="SIGTERM"), stopping_cleanly(0.05):
        time.sleep(10)
    with stopping_cleanly(0.2):
        pass
    time.sleep(0.4)  # a limit that was not reached sends nothing afterwards


def test_a_second_signal_does_not_wait(monkeypatch):
    reached = []
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), steps_undisturbed():
        send(signal.SIGINT)
        reached.append(1)
        send(signal.SIGINT)
        reached.append(2)
    assert reached == [1]
    # torchrun sends on what a terminal has sent to all already.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), steps_undisturbed():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        reached.append(3)
    assert reached == [1, 3]


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stopping_cleanly():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stopping_cleanly():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
