import pytest
import torch

from rtpurbo.benchmarks.session import Entry
from rtpurbo.errors import RTPurboError
from tests.benchmarks.support import FakeClock, session

FACTS = {
    "phase": "prefill",
    "batch_size": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_retrieval_heads": 1,
    "head_dim": 16,
    "sliding_window": 32,
}


def entry(name="peer", length=100, density=1.0, **options):
    facts = {**FACTS, "context_length": length, "density": density}
    return Entry(name, options.pop("variants", {"": lambda: lambda: None}), facts, **options)


def failing(error):
    def prepare():
        raise error

    return {"": prepare}


def test_correct_results_are_timed_and_logged():
    lines, written = [], []
    run = session(log=lines.append, on_record=lambda results: written.append(len(results.records)))
    run.run(entry("rtpurbo", density=0.1, check=lambda call: None, is_ours=True, note="a note"))
    run.run(entry())
    assert [record.implementation for record in run.results.records] == ["rtpurbo", "peer"]
    assert run.results.records[0].note == "a note"
    assert lines[0].startswith("prefill rtpurbo at 100 tokens, density 0.1: ")
    assert written == [1, 2]


def test_wrong_results_are_not_recorded():
    run = session()
    run.run(entry("rtpurbo", check=lambda call: "it is wrong", is_ours=True))
    assert not run.results.records
    assert run.results.errors == ["prefill rtpurbo at 100 tokens is not recorded: it is wrong."]


def test_a_peer_that_fails_is_a_note_and_our_failure_is_an_error():
    run = session()
    run.run(entry(variants=failing(RuntimeError("no kernel\nat all"))))
    run.run(entry("rtpurbo", variants=failing(ValueError("broken")), is_ours=True))
    run.run(entry("rtpurbo", variants=failing(torch.OutOfMemoryError("full")), is_ours=True))
    assert run.results.notes == [
        "prefill peer at 100 tokens skipped: RuntimeError: no kernel.",
        "prefill rtpurbo at 100 tokens skipped: OutOfMemoryError: full.",
    ]
    assert run.results.errors == ["prefill rtpurbo at 100 tokens skipped: ValueError: broken."]


def test_a_user_s_mistake_ends_the_run():
    with pytest.raises(RTPurboError):
        session().run(entry(variants=failing(RTPurboError("no such thing"))))
    run = session()
    with pytest.raises(RTPurboError), run.guarded("all"):
        raise RTPurboError("no such thing")
    with run.guarded("all"):
        raise ValueError("broken")
    assert run.results.errors == ["all skipped: ValueError: broken."]


def test_peers_that_would_take_too_long_are_left_out():
    clock = FakeClock([900.0])
    clock.times = lambda call, repeats: [900.0] * repeats
    run = session(clock=clock, time_limit=30)
    for length in (100, 1000):
        run.run(entry(length=length))
        run.run(entry("decoder", length=length, growth=1))
        run.run(entry("rtpurbo", length=length, is_ours=True))
    lengths = {(record.implementation, record.context_length) for record in run.results.records}
    assert ("peer", 1000) not in lengths
    assert {("peer", 100), ("decoder", 1000), ("rtpurbo", 1000)} <= lengths
    [note] = run.results.notes
    assert "--time-limit 30" in note


def test_the_faster_variant_counts_and_a_slow_one_is_tried_alone():
    made = []

    def variant(name):
        def prepare():
            made.append(name)
            return lambda: None

        return prepare

    variants = {"slow way": variant("slow way"), "fast way": variant("fast way")}
    clock = FakeClock([700.0, 400.0, 5000.0])
    run = session(clock=clock)
    clock.times = lambda call, repeats: [700.0 if made[-1] == "slow way" else 400.0] * repeats
    run.run(entry(variants=variants))
    assert run.results.records[0].milliseconds == 400.0
    assert run.results.records[0].note == "fast way"
    run.run(entry(length=400, variants=variants))
    assert made == ["slow way", "fast way", "fast way"]
    assert run.results.records[1].note == "fast way; measured once"
    # Nothing is known of another one: its first way is slow, and the second is not tried.
    run.run(entry("other", variants=variants))
    assert made[3:] == ["slow way"]


def test_only_wanted_implementations_are_measured():
    run = session(wanted=("peer",))
    run.run(entry("rtpurbo"))
    run.run(entry())
    assert [record.implementation for record in run.results.records] == ["peer"]


USUAL = {("peer", "prefill", "", "cpu", "", 1, 100, 4, 2, 16): 100.0}


def measured(times, name="peer", **options):
    """Record of an implementation whose measurements take these milliseconds, and the results."""
    remaining = list(times)
    clock = FakeClock()
    clock.times = lambda call, repeats: [remaining.pop(0)] * repeats
    clock.first = lambda call: 500.0  # above the warm-up
    run = session(clock=clock, usual=USUAL)
    run.run(entry(name, **options))
    assert not remaining
    [record] = run.results.records
    return record, run.results


def test_a_peer_that_is_slower_than_usual_is_measured_again():
    record, results = measured([450.0, 110.0])
    assert (record.milliseconds, record.usual_milliseconds) == (110.0, None)
    assert not results.notes


@pytest.mark.parametrize("times", [[450.0, 480.0, 440.0], [60.0]])
def test_a_peer_that_stays_far_off_its_usual_time_is_flagged(times):
    record, results = measured(times)
    assert (record.milliseconds, record.usual_milliseconds) == (times[-1], 100.0)
    [note] = results.notes
    assert f"far off its usual time: {times[-1]:g} ms instead of 100 ms" in note


def test_other_tasks_and_our_own_times_have_no_usual_time():
    assert measured([450.0], length=200)[0].usual_milliseconds is None
    assert measured([450.0], is_ours=True)[0].usual_milliseconds is None
