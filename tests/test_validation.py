import dataclasses

import pytest

from rtpurbo.config import AttentionRule, IndexerSettings
from rtpurbo.conversion.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import change_settings
from rtpurbo.validation import field_types

SETTINGS = default_settings("standard", 32768)
PARTS = ["attention", "indexer", "calibration", "stage1", "stage2", "stream"]
FIELDS = [
    f"{part}.{field.name}"
    for part in PARTS
    for field in dataclasses.fields(getattr(SETTINGS, part))
] + ["seed"]


def value_of(settings, name):
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("stage2.steps", "abc", "stage2.steps is 'abc', but it must be a whole number."),
        ("stage2.steps", None, "stage2.steps is null, but it must be a whole number."),
        ("stage2.steps", True, "stage2.steps is true, but it must be a whole number."),
        ("stage2.steps", 1.5, "stage2.steps is 1.5, but it must be a whole number."),
        ("stage2.steps", float("inf"), "stage2.steps is inf, but it must be a whole number."),
        ("stage2.learning_rate", float("nan"), "learning_rate is nan, but it must be a number."),
        (
            "stage2.lora_scale",
            "all",
            "stage2.lora_scale is 'all', but it must be a number or null.",
        ),
        ("stage2.lengths", "abc", "is 'abc', but it must be a list of whole numbers, such as"),
        ("stage2.lengths", [2048, "x"], "is [2048, 'x'], but it must be a list of whole numbers"),
        ("stage2.lengths", [[2048]], "is [[2048]], but it must be a list of whole numbers"),
        ("stage2.lengths", None, "is null, but it must be a list of whole numbers"),
        ("stage2.targets", 3, "is 3, but it must be one of: both, answers, text."),
        ("stream.enabled", 1, "stream.enabled is 1, but it must be true or false."),
        ("attention", 5, "attention is 5, but it must be AttentionRule; name one of its settings"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, sentence):
    with pytest.raises(RTPurboError) as error:
        change_settings(SETTINGS, {name: value})
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", ["abc", {"a": 1}, object(), [["x"]]])
@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_refuses_some_values(name, value):
    """Every field has a type that is checked: a field of a new type would raise a KeyError here."""
    with pytest.raises(RTPurboError, match=f"^{name} is .* but it must be"):
        change_settings(SETTINGS, {name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_takes_its_own_value(name):
    value = value_of(SETTINGS, name)
    assert change_settings(SETTINGS, {name: value}) == SETTINGS


def test_values_are_converted_to_the_type_of_the_setting():
    changed = change_settings(
        SETTINGS,
        {"stage2.lengths": 16384, "stage1.lengths": [8192.0], "stage2.steps": 1e2, "seed": 3.0},
    )
    assert changed.stage2.lengths == (16384,)
    assert changed.stage1.lengths == (8192,)
    assert (changed.stage2.steps, changed.seed) == (100, 3)
    assert all(type(each) is int for each in (*changed.stage1.lengths, changed.stage2.steps))
    assert type(change_settings(SETTINGS, {"stage2.lora_scale": 1}).stage2.lora_scale) is float


def test_a_whole_part_can_be_given_in_python():
    rule = AttentionRule(sliding_window=128)
    assert change_settings(SETTINGS, {"attention": rule}).attention == rule
    with pytest.raises(RTPurboError, match=r"attention is .* but it must be AttentionRule"):
        change_settings(SETTINGS, {"attention": IndexerSettings()})


def test_types_of_inherited_fields_are_known():
    types = field_types(type(SETTINGS.stage1))
    assert types["lengths"] == tuple[int, ...]
    assert types["steps"] is int
