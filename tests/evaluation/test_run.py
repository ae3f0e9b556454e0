import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy
from rtpurbo.evaluation.run import evaluate, run_order

# Those with a budget come last.
RUN = sorted(POLICIES, key=lambda name: isinstance(POLICIES[name], BudgetPolicy))


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
        policies=["all"],
        device="cpu",
        progress=lambda *call: calls.append(call),
    )
    assert [(record.policy, record.task, record.context_length) for record in records] == [
        (policy, task, length)
        for policy in RUN
        for task, length in (("single", 512), ("prose", 128), ("prose", 256))
    ]
    assert all(record.samples == 2 and record.kv_bytes > 0 for record in records)
    share = {record.policy: record.far_tokens_read for record in records}
    everything = {"full", "dense-heads", "random-heads"}
    assert {name for name in share if share[name] == 1} == everything
    assert {name for name in share if share[name] == 0} == {"local-only"}
    for record in records:
        assert record.ci95[0] <= record.score <= record.ci95[1]
        assert record.measured_rows > 0
        # A needle's answer may be some tokens longer than expected.
        assert 0 < record.tokens_read_p50 <= record.tokens_read_p95 <= record.context_length + 8
        assert 0 < record.tokens_read_mean <= record.tokens_read_p95 * 1.01
        kept = {record.policy: record.mass_kept}
        assert all(
            (mass == pytest.approx(1)) == (name in everything) for name, mass in kept.items()
        )

    last = calls[-1]
    assert last[:3] == ("top-k", 6, 6)
    assert last[3] == {"perplexity prose 256": records[-1].score}


def test_budgets_are_the_mean_reads_of_rtpurbo_by_suite_and_length(tiny_artifact):
    records = quick(
        tiny_artifact,
        suites=["perplexity@96,256", "needle:single@512"],
        policies=["quest", "top-k"],
        samples=2,
    )
    assert [record.policy for record in records[::3]] == ["rtpurbo", "quest", "top-k"]
    window_and_sinks = 32 + 2
    for of_rtpurbo, of_quest, of_top_k in zip(records[:3], records[3:6], records[6:], strict=True):
        assert of_rtpurbo.far_token_budget is None
        assert of_top_k.far_token_budget == of_quest.far_token_budget > 0
        read = of_rtpurbo.tokens_read_mean
        if of_rtpurbo.suite == "needle":  # every row has all its window
            assert read <= window_and_sinks + of_top_k.far_token_budget < read + 1
            assert of_top_k.tokens_read_mean == window_and_sinks + of_top_k.far_token_budget
            # Whole pages, of which the window may hold a part.
            assert abs(of_quest.tokens_read_mean - of_top_k.tokens_read_mean) <= 16
        else:  # not all rows have so much that is far
            assert read / 2 < of_top_k.tokens_read_mean <= read + 1


def test_tests_without_far_tokens_have_no_budget(tiny_artifact):
    records = quick(tiny_artifact, policies=["rtpurbo", "top-k"], lengths=[20])
    assert [record.far_token_budget for record in records] == [None, 0]
    assert records[0].score == records[1].score


def test_the_order_of_policies():
    assert run_order(["top-k", "full", "full"]) == ["full", "rtpurbo", "top-k"]
    assert run_order(["top-k", "rtpurbo", "full"]) == ["rtpurbo", "full", "top-k"]
    assert run_order(["full", "all"]) == RUN
    assert run_order(["local-only"]) == ["local-only"]


def test_no_reads_without_far_tokens(tiny_artifact):
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
        ({"suites": ["lm-eval"]}, "the suite 'lm-eval' needs tasks, as in lm-eval:aime24"),
        ({"data": ["nothing.txt"]}, "nothing.txt"),
        ({"lengths": {"needle": [512]}}, "the suite 'perplexity' needs lengths"),
        ({"lengths": [2048]}, "2,048 tokens do not fit the model's context of 1,024"),
        ({"samples": 0}, "samples is 0"),
        ({"device": "abacus"}, "'abacus' is not available"),
    ],
)
def test_mistakes_are_reported(tiny_artifact, options, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        quick(tiny_artifact, **options)


def test_cache_sizes_can_be_computed_at_another_length(tiny_artifact):
    [short] = quick(tiny_artifact, policies=["full"])
    [long] = quick(tiny_artifact, policies=["full"], cache_length=1024)
    assert long.kv_bytes == 8 * short.kv_bytes


def test_every_policy_gets_the_same_ruler_and_every_sample_is_kept(tiny_artifact):
    kept, calls = [], []
    records = evaluate(
        tiny_artifact,
        suites=["ruler:niah_single_1,fwe@600"],
        samples=2,
        policies=["all"],
        device="cpu",
        keep_sample=kept.append,
        progress=lambda *call: calls.append(call),
    )
    tests = [(record.policy, record.task) for record in records]
    assert tests == [(policy, task) for policy in RUN for task in ("niah_single_1", "fwe")]
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


def test_lengths_that_do_not_fit_are_refused_before_anything_runs(tiny_artifact):
    calls = []
    with pytest.raises(RTPurboError, match=r"vt does not fit into 600 tokens: .* at least 2,"):
        quick(
            tiny_artifact,
            suites=["perplexity", "ruler:niah_single_1,vt@600"],
            progress=lambda *call: calls.append(call),
        )
    assert all(done == 0 for stage, done, *_ in calls if stage != "prompts")


def test_missing_question_files_are_reported(tiny_artifact):
    for option in ("squad", "hotpotqa"):
        with pytest.raises(RTPurboError, match="there is no file of questions nothing"):
            quick(tiny_artifact, **{option: "nothing.json"})
