from dataclasses import replace

import pytest

from rtpurbo.conversion.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.lengths import check_lengths, check_stage1_lengths, lengths_of
from rtpurbo.settings import change_settings

CONTEXT = 32768
SETTINGS = default_settings("thorough", CONTEXT)  # window 4096


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"calibration.length": 4100}, "calibration needs documents longer than sinks and window"),
        ({"stage1.lengths": (8192, 4100)}, "stage 1 needs sequences longer than sinks and window"),
        ({"stage2.lengths": (2048,)}, "stage 2 needs sequences longer than sinks and window"),
        ({"stage2.lengths": (512, 4100)}, "but stage2.lengths has 4,100: raise --max-length or"),
        ({"calibration.length": 40000}, r"calibration.length\) of 40,000 tokens do not fit"),
        ({"stage1.lengths": (8192, 40000)}, r"stage1.lengths\) of 40,000 tokens do not fit"),
        ({"stage2.lengths": (8192, 40000)}, r"stage2.lengths\) of 40,000 tokens do not fit"),
    ],
)
def test_a_stage_that_cannot_run_or_learn_is_refused(changes, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        check_lengths(change_settings(SETTINGS, changes), CONTEXT)


def test_stages_that_do_not_run_are_not_checked():
    settings = change_settings(SETTINGS, {"stage2.lengths": (512,), "calibration.length": 99999})
    check_lengths(settings, CONTEXT, ["stage1"])
    check_lengths(change_settings(settings, {"stage2.steps": 0}), CONTEXT, ["stage1", "stage2"])
    with pytest.raises(RTPurboError, match="stage 2"):
        check_lengths(settings, CONTEXT, ["stage1", "stage2"])


def test_short_sequences_may_accompany_long_ones_in_stage2():
    check_lengths(change_settings(SETTINGS, {"stage2.lengths": (512, 8192)}), CONTEXT)


def test_a_shorter_window_of_retrieval_heads_counts():
    settings = change_settings(
        SETTINGS, {"stage1.lengths": (2560,), "attention.retrieval_window": 1024}
    )
    check_stage1_lengths(settings.stage1, CONTEXT, settings.attention)
    with pytest.raises(RTPurboError, match=r"sinks and window \(4,224 tokens\)"):
        check_stage1_lengths(
            settings.stage1, CONTEXT, replace(settings.attention, retrieval_window=None)
        )


def test_lengths_by_stage():
    assert lengths_of(SETTINGS, ["calibration"]) == {"calibration": (16384,)}
    assert set(lengths_of(change_settings(SETTINGS, {"stage2.steps": 0}))) == {
        "calibration",
        "stage1",
    }
