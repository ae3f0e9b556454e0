import pytest

from rtpurbo.cli import options
from rtpurbo.conversion.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import change_settings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ratio", 0.2),
        ("threshold", 0.5),
        ("count", 3),
        ("window", 256),
        ("top_p", 0.8),
        ("reading", "far"),
        ("index_space", "pre_rope"),
        ("index_dim", 8),
        ("stage1_steps", 3),
        ("stage2_steps", 0),
        ("lora_rank", 4),
        ("stream", True),
        ("seed", 5),
    ],
)
def test_every_option_changes_a_setting(option, value):
    before = default_settings("quick", 4096)
    after = change_settings(before, options.changed_settings(None, **{option: value}))
    assert str(value) in str(after)
    assert after != before


def test_options_left_out_change_nothing():
    assert options.changed_settings(None, ratio=None, seed=0) == {"seed": 0}


def test_tasks_and_lengths_go_to_their_suite():
    suites = options.suites_with_tasks
    assert suites(["lm-eval"], "aime24,mmlu_pro_math", None) == ["lm-eval:aime24,mmlu_pro_math"]
    assert suites(["ruler@4096"], "vt", [512]) == ["ruler:vt@4096"]
    # Lengths are for all suites but lm-eval, whose tasks have the model's unless named for them.
    assert suites(["ruler", "lm-eval:ruler"], None, [512, 1024]) == [
        "ruler",
        "lm-eval:ruler@512,1024",
    ]
    assert suites(("needle", "perplexity"), None, None) == ["needle", "perplexity"]
    for names in (["ruler:vt"], ["needle", "ruler"]):
        with pytest.raises(RTPurboError, match="--tasks needs one --suite that names no tasks"):
            suites(names, "cwe", None)


def test_assignments_are_a_dictionary():
    given = ["aime24=a.jsonl", "aime25=b=c.jsonl"]
    assert options.assignments("--x", given) == {"aime24": "a.jsonl", "aime25": "b=c.jsonl"}
    assert options.assignments("--x", None) == {}
    for wrong in ("aime24", "aime24=", "=a.jsonl"):
        with pytest.raises(RTPurboError, match=f"--x {wrong} names no value"):
            options.assignments("--x", [wrong])


def test_other_settings_are_json_or_plain_text():
    others = ["stage1.lengths=[2048, 4096]", "stage2.prefill_mode=top_p", "stage2.steps=7"]
    assert options.changed_settings(others, stage2_steps=3) == {
        "stage1.lengths": [2048, 4096],
        "stage2.prefill_mode": "top_p",
        "stage2.steps": 7,
    }
    with pytest.raises(RTPurboError, match="--set seed names no value"):
        options.changed_settings(["seed"])


def test_heads_are_chosen_in_one_way():
    for others, given in (
        (None, {"ratio": 0.2, "threshold": 0.5}),
        (None, {"threshold": 0.5, "count": 3}),
        (["calibration.count=3"], {"ratio": 0.2}),
    ):
        with pytest.raises(
            RTPurboError, match="are mutually exclusive: choose retrieval heads by one"
        ):
            options.changed_settings(others, **given)
    # Unset in so many words, a setting is no second choice.
    assert options.changed_settings(["calibration.count=null"], ratio=0.2)["calibration.ratio"]
