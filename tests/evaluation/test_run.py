import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.policies import POLICIES
from rtpurbo.evaluation.run import Cell, choose_cells, evaluate


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


def test_suites_have_default_tasks():
    assert choose_cells(["needle", "needle:multivalue"], [512], 3) == [
        Cell("needle", task, 512, 3) for task in ("single", "multikey", "multivalue")
    ]


def test_tests_may_stand_beside_suites():
    cells = [Cell("needle", "single", 300, 1), Cell("perplexity", "prose", 128, 2)]
    assert choose_cells([*cells, "perplexity@256"], [512], 3) == [
        *cells,
        Cell("perplexity", "prose", 256, 3),
    ]


def test_the_cache_may_be_weighed_at_another_length(tiny_artifact):
    [short] = quick(tiny_artifact, policies=["full"])
    [long] = quick(tiny_artifact, policies=["full"], cache_length=1024)
    assert long.kv_bytes == 8 * short.kv_bytes


def test_a_suite_may_have_lengths_of_its_own():
    assert choose_cells(["perplexity@64,128"], [512], 3) == [
        Cell("perplexity", "prose", length, 3) for length in (64, 128)
    ]
    with pytest.raises(RTPurboError, match="perplexity@2048,8192"):
        choose_cells(["perplexity@long"], [512], 3)
