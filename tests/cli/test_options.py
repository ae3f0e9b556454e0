import pytest

from rtpurbo.cli import options
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import change_settings, preset_settings


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
        ("seed", 5),
    ],
)
def test_every_option_changes_a_setting(option, value):
    before = preset_settings("quick", 4096)
    after = change_settings(before, options.changed_settings(None, **{option: value}))
    assert str(value) in str(after)
    assert after != before


def test_options_left_out_change_nothing():
    assert options.changed_settings(None, ratio=None, seed=0) == {"seed": 0}


def test_other_settings_are_json_or_plain_text():
    others = ["stage1.lengths=[2048, 4096]", "stage2.prefill_mode=top_p", "stage2.steps=7"]
    assert options.changed_settings(others, stage2_steps=3) == {
        "stage1.lengths": (2048, 4096),
        "stage2.prefill_mode": "top_p",
        "stage2.steps": 7,
    }
    with pytest.raises(RTPurboError, match="--set seed names no value"):
        options.changed_settings(["seed"])
