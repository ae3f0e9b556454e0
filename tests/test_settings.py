import json
from pathlib import Path

import pytest

from rtpurbo.conversion.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.lengths import check_context
from rtpurbo.renamed_settings import REMOVED, RENAMED
from rtpurbo.settings import (
    IndexerTrainingSettings,
    change_settings,
    recorded_changes,
)

SETTINGS = default_settings("quick", 4096)


def test_changes_are_applied_by_dotted_name():
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
    shares = {"stage1.mixture.haystack": 0.6, "stage1.mixture.needles": 0.1}
    assert change_settings(SETTINGS, shares).stage1.mixture == {"needles": 0.1, "haystack": 0.6}
    limits = change_settings(SETTINGS, {"calibration.threshold": 0.5})
    other = change_settings(limits, {"calibration.count": 3, "calibration.threshold": None})
    assert (other.calibration.count, other.calibration.threshold) == (3, None)


@pytest.mark.parametrize(
    "name", ["refresh.steps", "steps", "stage3.steps", "stage1.stops", "seed.x", "stage1.steps.x"]
)
def test_unknown_settings_are_refused(name):
    with pytest.raises(RTPurboError, match=f"there is no setting '{name}'"):
        change_settings(SETTINGS, {name: 1})


def test_values_out_of_range_are_refused():
    with pytest.raises(RTPurboError, match="steps is -1, but it must be at least 0"):
        change_settings(SETTINGS, {"stage1.steps": -1})
    with pytest.raises(RTPurboError, match="not by both"):
        change_settings(SETTINGS, {"calibration.count": 1, "calibration.threshold": 0.5})
    with pytest.raises(RTPurboError, match="at most 1 together"):
        change_settings(SETTINGS, {"stage1.mixture": {"needles": 0.6, "passage": 0.5}})
    with pytest.raises(RTPurboError, match="a step needs at least one"):
        change_settings(SETTINGS, {"stage2.sequences_per_step": 0})
    with pytest.raises(RTPurboError, match="at least 1"):
        change_settings(SETTINGS, {"stream.buffer_size": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage1.steps_per_sequence", 0),
        ("stage1.probe_every", 0),
        ("stage1.queries_per_step", 0),
        ("stage2.checkpoint_every", 0),
        ("stage2.lora_rank", -1),
        ("stage2.learning_rate", -1e-4),
        ("calibration.count", -1),
    ],
)
def test_values_below_their_bound_are_refused(name, value):
    with pytest.raises(RTPurboError, match=f"{name.split('.')[1]} is {value}, but it must be at"):
        change_settings(SETTINGS, {name: value})


def test_cases_beyond_the_context_are_refused():
    check_context("sequences", 4096, 4096)
    sentence = (
        "^sequences of 4,097 tokens do not fit the model's context of 4,096: choose a shorter"
    )
    with pytest.raises(RTPurboError, match=sentence):
        check_context("sequences", 4097, 4096)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("targets", "all", "targets is 'all', but it must be one of: both, answers, text"),
        ("targets_per_sequence", 0, "targets_per_sequence is 0"),
        ("answer_weight", -1, "answer_weight is -1.0, but it must be at least 0"),
    ],
)
def test_corrupt_targets_are_refused(name, value, complaint):
    with pytest.raises(RTPurboError, match=complaint):
        change_settings(SETTINGS, {f"stage2.{name}": value})


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ({"stage1.needle_share": 0.25}, {"stage1.mixture.needles": 0.25}),
        ({"stage2.conversation_share": 0.25}, {"stage2.mixture.conversations": 0.25}),
        ({"stage1.rows_per_step": 5}, {"stage1.queries_per_step": 5}),
        ({"stage1.start_sequences": 7}, {"stage1.init_sequences": 7}),
        ({"stage2.share": None}, {"stage2.lora_scale": None}),
        ({"stage2.labels": "text"}, {"stage2.targets": "text"}),
        ({"stage2.labels_per_sequence": 9}, {"stage2.targets_per_sequence": 9}),
        ({"stage2.decode_rows": 0}, {"stage2.decode_queries": 0}),
        ({"calibration.ranking": "chains"}, {"calibration.ranking": "variable_tracking"}),
        ({"calibration.ranking": "turns"}, {"calibration.ranking": "interleaved"}),
    ],
)
def test_former_names_are_accepted_and_say_what_replaced_them(former, present, caplog):
    expected = change_settings(SETTINGS, present)
    assert expected != SETTINGS
    assert not caplog.messages
    assert change_settings(SETTINGS, former) == expected
    [message] = caplog.messages
    assert "is now called" in message
    [(name, value)] = present.items()
    assert name in message
    assert name == next(iter(former)) or str(value) not in message


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_refused_and_ignored_in_records(name):
    with pytest.raises(RTPurboError, match=f"no setting '{name}' any more: {REMOVED[name][:20]}"):
        change_settings(SETTINGS, {name: "covariance"})
    part, _, item = name.partition(".")
    recorded = {part: {item: "weight", "steps": 7}}
    assert recorded_changes(recorded, part) == {f"{part}.steps": 7}


def test_every_former_name_maps_to_a_setting():
    for part, names in RENAMED.items():
        for former, present in names.items():
            value = SETTINGS
            for each in f"{part}.{present}".split(".")[:2]:
                value = getattr(value, each)
            assert not hasattr(getattr(SETTINGS, part), former)


def test_a_mixture_has_one_form():
    stage1 = IndexerTrainingSettings(mixture={"passage": 0.2, "needles": 0.1, "reading": 0.0})
    assert list(stage1.mixture.items()) == [("needles", 0.1), ("passage", 0.2)]
    whole = change_settings(SETTINGS, {"stage1.mixture": {"reading": 1}})
    assert whole.stage1.mixture == {"reading": 1.0}
    entry = change_settings(whole, {"stage1.mixture.reading": 0.5, "stage1.mixture.counting": 0.5})
    assert entry.stage1.mixture == {"counting": 0.5, "reading": 0.5}
    assert change_settings(entry, {"stage1.mixture.reading": 0}).stage1.mixture == {"counting": 0.5}


def test_unknown_tasks_are_refused():
    with pytest.raises(
        RTPurboError, match=r"'stage1.mixture.needle': the tasks of stage1 are need"
    ):
        change_settings(SETTINGS, {"stage1.mixture.needle": 0.5})
    # Conversations are too short for far keys.
    with pytest.raises(RTPurboError, match=r"no setting 'stage1.mixture.conversations'"):
        change_settings(SETTINGS, {"stage1.mixture.conversations": 0.5})
    with pytest.raises(RTPurboError, match=r"mixture is {'x': 1}, but it must be shares of these"):
        IndexerTrainingSettings(mixture={"x": 1})


ARTIFACTS = sorted(Path(__file__).parents[1].glob("artifacts/*/rtpurbo_config.json"))


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.parent.name)
def test_settings_of_published_artifacts_are_read(path):
    recorded = json.loads(path.read_text("utf-8")).get("settings")
    if not recorded:
        pytest.skip("a dense model")
    changes = recorded_changes(recorded, "calibration", "stage1", "stage2")
    # Records of the first versions lack tasks that came later, which then have no share.
    changes = {"stage2.mixture": {}, **changes}
    read = change_settings(default_settings("thorough", 65536), changes)
    names = {"needle": "needles", "variable": "variables", "document": "documents",
             "conversation": "conversations"}  # fmt: skip
    for part in ("stage1", "stage2"):
        former = {
            names.get(name.removesuffix("_share"), name.removesuffix("_share")): share
            for name, share in recorded[part].items()
            if name.endswith("_share") and share
        }
        assert getattr(read, part).mixture == recorded[part].get("mixture", former)
    for part, former, name in (
        ("stage1", "rows_per_step", "queries_per_step"),
        ("stage1", "start_sequences", "init_sequences"),
        ("stage2", "labels_per_sequence", "targets_per_sequence"),
        ("stage2", "decode_rows", "decode_queries"),
    ):
        # Artifacts made since the renaming have the present names.
        stored = name if name in recorded[part] else former
        assert getattr(getattr(read, part), name) == recorded[part][stored]
    rankings = {"turns": "interleaved", "gates": "gates", "copies": "induction"}
    ranking = recorded["calibration"].get("ranking")
    assert ranking is None or read.calibration.ranking == rankings.get(ranking, ranking)
    assert recorded_changes(read.to_dict(), "stage1") == recorded_changes(
        {"stage1": {**read.to_dict()["stage1"], "sequences_per_step": 3, "unknown": 1}}, "stage1"
    )
