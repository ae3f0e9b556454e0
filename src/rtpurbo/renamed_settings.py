"""Former names and values of settings, in records of earlier versions and in `--set`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHARES = {
    "needle_share": "mixture.needles",
    "variable_share": "mixture.variables",
    "passage_share": "mixture.passage",
    "haystack_share": "mixture.haystack",
    "counting_share": "mixture.counting",
    "reading_share": "mixture.reading",
    "document_share": "mixture.documents",
}

RENAMED: Mapping[str, Mapping[str, str]] = {
    "stage1": {
        **_SHARES,
        "rows_per_step": "queries_per_step",
        "start_sequences": "init_sequences",
    },
    "stage2": {
        **_SHARES,
        "conversation_share": "mixture.conversations",
        "share": "lora_scale",
        "labels": "targets",
        "labels_per_sequence": "targets_per_sequence",
        "decode_rows": "decode_queries",
    },
}
"""Present names of settings, by part and former name."""

_INIT = "indexers are always initialised from data, which was the default, `covariance`"

_STRIDE = (
    "target tokens of the text are drawn at random; stage2.targets_per_sequence is their number"
)

REMOVED: Mapping[str, str] = {
    "stage1.init": _INIT,
    "stage1.start": _INIT,
    "stage2.target_stride": _STRIDE,
    "stage2.label_stride": _STRIDE,
    "stage2.cross_entropy_weight": "stage 2 learns from the teacher alone, which was the default, 0",
}
"""Reasons why settings of earlier versions are gone, by dotted name."""

RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "calibration.ranking": {
        "copies": "induction",
        "chains": "variable_tracking",
        "turns": "interleaved",
    }
}
"""Present values of settings by dotted name and former value."""


def current_setting(name: str, value: Any) -> tuple[str, Any]:
    """Returns a setting under its present name and with its present value.

    Args:
        name: dotted name, present or former.
        value: value, present or former.
    """
    part, _, item = name.partition(".")
    item = RENAMED.get(part, {}).get(item, item)
    name = f"{part}.{item}" if item else part
    values = RENAMED_VALUES.get(name, {})
    return name, values.get(value, value) if isinstance(value, str) else value


def current_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns recorded settings, of this version or an earlier one, under present names.

    Args:
        recorded: a result of `ConversionSettings.to_dict`, or parts of it.
    """
    settings: dict[str, Any] = {}
    for part, items in recorded.items():
        if not isinstance(items, Mapping):
            settings[part] = items
            continue
        settings[part] = {}
        for former, former_value in items.items():
            name, value = current_setting(f"{part}.{former}", former_value)
            _, item, *task = name.split(".")
            if task:
                mixture = settings[part].setdefault(item, {})
                # Mixtures hold tasks with a share only.
                mixture |= {task[0]: value} if value else {}
            else:
                settings[part][item] = value
    return settings
