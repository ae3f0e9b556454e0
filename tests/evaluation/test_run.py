import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.policies import POLICIES
from rtpurbo.evaluation.run import evaluate


def quick(artifact, **options):
    options = {"suites": ["perplexity"], "lengths": [128], "samples": 1, "device": "cpu"} | options
    return evaluate(artifact, **options)


def test_every_policy_takes_every_test(tiny_artifact):
    calls = []
    records = evaluate(
        tiny_artifact,
        suites=["needle:single", "perplexity"],
        lengths={"needle": [512], "perplexity": [128, 256]},
        samples=2,
        policies=list(POLICIES),
        device="cpu",
        progress=lambda *call: calls.append(call),
    )
    assert [(record.policy, record.task, record.context_length) for record in records] == [
        (policy, task, length)
        for policy in POLICIES
        for task, length in (("single", 512), ("prose", 128), ("prose", 256))
    ]
    assert all(record.samples == 2 and record.kv_bytes > 0 for record in records)
    share = {record.policy: record.far_tokens_read for record in records}
    assert share["full"] == share["random-heads"] == 1
    assert share["local-only"] == 0
    assert 0 < share["rtpurbo"] < 1
    assert 0 < share["rtpurbo-sparse-prefill"] < 1

    last = calls[-1]
    assert last[:3] == ("random-heads", 6, 6)
    assert last[3] == {"perplexity prose 256": records[-1].score}


def test_nothing_far_is_nothing_read(tiny_artifact):
    # The tiny artifact's window is 32.
    [record] = quick(tiny_artifact, policies=["rtpurbo"], lengths=[20])
    assert record.far_tokens_read is None


def test_the_seed_gives_the_same_records(tiny_artifact):
    assert quick(tiny_artifact) == quick(tiny_artifact)
    assert quick(tiny_artifact) != quick(tiny_artifact, seed=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policies": ["fool"]}, "there is no policy 'fool': choose from full, rtpurbo"),
        ({"suites": ["needles"]}, "there is no suite 'needles': choose from needle, perplexity"),
        ({"suites": ["needle:double"]}, "there is no needle task 'double': choose from single"),
        ({"suites": ["ruler:vt,tv"]}, "there is no ruler task 'tv': choose from niah_single_1"),
        ({"lengths": []}, "needs lengths of at least 2"),
        ({"lengths": {"needle": [512]}}, "the suite 'perplexity' needs lengths"),
        ({"lengths": [2048]}, "2,048 tokens do not fit the model's context of 1,024"),
        ({"samples": 0}, "samples is 0"),
        ({"device": "abacus"}, "'abacus' is not available"),
    ],
)
def test_mistakes_are_told(tiny_artifact, options, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        quick(tiny_artifact, **options)


def test_the_cache_may_be_weighed_at_another_length(tiny_artifact):
    [short] = quick(tiny_artifact, policies=["full"])
    [long] = quick(tiny_artifact, policies=["full"], cache_length=1024)
    assert long.kv_bytes == 8 * short.kv_bytes


def test_every_policy_gets_the_same_ruler_and_every_sample_is_kept(tiny_artifact):
    kept, calls = [], []
    records = evaluate(
        tiny_artifact,
        suites=["ruler:niah_single_1,fwe@600"],
        samples=2,
        policies=list(POLICIES),
        device="cpu",
        keep_sample=kept.append,
        progress=lambda *call: calls.append(call),
    )
    tests = [(record.policy, record.task) for record in records]
    assert tests == [(policy, task) for policy in POLICIES for task in ("niah_single_1", "fwe")]
    assert all(0 <= record.score <= 100 and record.samples == 2 for record in records)
    assert [(item.policy, item.task, item.number) for item in kept] == [
        (*test, number) for test in tests for number in range(2)
    ]
    # Four prompts, each asked of every policy.
    prompts = {(item.task, item.number, item.sample.prompt_hash) for item in kept}
    assert len(prompts) == 4
    assert calls[1][:3] == ("prompts", 0, 2)


def test_needle_samples_are_kept_and_perplexity_has_none(tiny_artifact):
    kept = []
    quick(
        tiny_artifact,
        suites=["needle:single@512", "perplexity"],
        policies=["full"],
        keep_sample=kept.append,
    )
    [item] = kept
    assert (item.suite, item.task, item.context_length) == ("needle", "single", 512)


def test_what_does_not_fit_is_told_before_anything_runs(tiny_artifact):
    calls = []
    with pytest.raises(RTPurboError, match=r"vt does not fit into 600 tokens: .* at least 2,"):
        quick(
            tiny_artifact,
            suites=["perplexity", "ruler:niah_single_1,vt@600"],
            progress=lambda *call: calls.append(call),
        )
    assert all(done == 0 for stage, done, *_ in calls if stage != "prompts")


def test_question_files_that_are_not_there_are_told(tiny_artifact):
    for option in ("squad", "hotpotqa"):
        with pytest.raises(RTPurboError, match="there is no file of questions nothing"):
            quick(tiny_artifact, **{option: "nothing.json"})
