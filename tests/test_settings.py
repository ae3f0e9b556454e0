import pytest

from rtpurbo.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import change_settings, check_context

SETTINGS = default_settings("quick", 4096)


def test_changes_go_where_their_names_say():
    changed = change_settings(
        SETTINGS, {"stage1.steps": 7, "attention.top_p": 0.5, "seed": 3, "calibration.count": 4}
    )
    assert changed.stage1.steps == 7
    assert changed.attention.top_p == 0.5
    assert changed.attention.sliding_window == SETTINGS.attention.sliding_window
    assert changed.seed == 3
    assert changed.calibration.count == 4
    assert changed.stage2 == SETTINGS.stage2
    assert change_settings(SETTINGS, {}) == SETTINGS


def test_changes_of_a_part_are_made_together():
    # One by one, the first of them would make shares of more than 1.
    shares = {"stage1.haystack_share": 0.6, "stage1.needle_share": 0.1}
    assert change_settings(SETTINGS, shares).stage1.haystack_share == 0.6
    limits = change_settings(SETTINGS, {"calibration.threshold": 0.5})
    other = change_settings(limits, {"calibration.count": 3, "calibration.threshold": None})
    assert (other.calibration.count, other.calibration.threshold) == (3, None)


@pytest.mark.parametrize(
    "name", ["refresh.steps", "steps", "stage3.steps", "stage1.stops", "seed.x"]
)
def test_unknown_settings_are_refused(name):
    with pytest.raises(RTPurboError, match=f"there is no setting '{name}'"):
        change_settings(SETTINGS, {name: 1})


def test_values_out_of_range_are_refused():
    with pytest.raises(RTPurboError, match="cannot be negative"):
        change_settings(SETTINGS, {"stage1.steps": -1})
    with pytest.raises(RTPurboError, match="not by both"):
        change_settings(SETTINGS, {"calibration.count": 1, "calibration.threshold": 0.5})
    with pytest.raises(RTPurboError, match="at most 1 together"):
        change_settings(SETTINGS, {"stage1.needle_share": 0.6, "stage1.passage_share": 0.5})
    with pytest.raises(RTPurboError, match="a step needs at least one"):
        change_settings(SETTINGS, {"stage2.sequences_per_step": 0})
    with pytest.raises(RTPurboError, match="at least 1"):
        change_settings(SETTINGS, {"stream.buffer_size": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage1.steps_per_sequence", 0),
        ("stage1.probe_every", 0),
        ("stage1.rows_per_step", 0),
        ("stage2.checkpoint_every", 0),
        ("stage2.lora_rank", -1),
        ("stage2.learning_rate", -1e-4),
        ("calibration.count", -1),
    ],
)
def test_values_below_their_bound_are_refused(name, value):
    with pytest.raises(RTPurboError, match=f"{name.split('.')[1]} is {value}, but it must be at"):
        change_settings(SETTINGS, {name: value})


def test_what_is_longer_than_the_context_is_refused():
    check_context("sequences", 4096, 4096)
    sentence = (
        "^sequences of 4,097 tokens do not fit the model's context of 4,096: choose a shorter"
    )
    with pytest.raises(RTPurboError, match=sentence):
        check_context("sequences", 4097, 4096)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("labels", "all", "labels is 'all', but it must be one of: both, answers, text"),
        ("label_stride", 0, "label_stride is 0"),
        ("cross_entropy_weight", -1, "cannot be negative"),
    ],
)
def test_labels_are_checked(name, value, complaint):
    with pytest.raises(RTPurboError, match=complaint):
        change_settings(SETTINGS, {f"stage2.{name}": value})


def test_a_setting_that_was_renamed_is_named():
    with pytest.raises(RTPurboError, match=r"'stage2.share' is called 'stage2.lora_scale' now"):
        change_settings(SETTINGS, {"stage2.share": None})
