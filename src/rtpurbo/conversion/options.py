"""Options that all functions of a conversion share, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import torch

from rtpurbo.config import AttentionRule
from rtpurbo.conversion.defaults import default_rule, default_settings, resolve_effort
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length, convertible_shapes
from rtpurbo.settings import ConversionSettings, Progress, change_settings


class SettingsOptions(TypedDict, total=False):
    """Options that determine settings, texts and device.

    Attributes:
        settings: all hyper-parameters; those of `effort` if None.
        changes: fields to change on them, as `rtpurbo.settings.change_settings` takes them.
        effort: `quick` (two CPU cores), `standard` (a GPU), `thorough` (more steps, longer sequences), or
            `auto`, which is `quick` on a CPU and `standard` on a GPU.
        max_length: tokens of the longest training sequence; the effort's if None.
        data: files or `hf:NAME` to train on; Python's own documentation if None.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the frozen base model: `float32`, `bfloat16`, `float16`, or `auto`, the checkpoint's on a
            GPU and float32 on a CPU. What is trained is float32.
    """

    settings: ConversionSettings | None
    changes: Mapping[str, Any] | None
    effort: str
    max_length: int | None
    data: Sequence[str] | None
    device: str
    dtype: str


class JobOptions(SettingsOptions, total=False):
    """Options of a job that writes an artifact; it has those of `SettingsOptions` too.

    Attributes:
        resume: continue an interrupted job with the same output folder.
        force: replace an existing output folder, or start an interrupted job anew.
        progress: called after each step.
        parallel: how the processes that `torchrun` started share the work: `data`, each with the whole
            model and its part of the texts, or `fsdp`, each with a part of the weights too.
        report_to: experiment trackers that receive the figures, such as `tensorboard`.
    """

    resume: bool
    force: bool
    progress: Progress
    parallel: str
    report_to: Sequence[str]


def check_names(options: Mapping[str, Any], kind: type) -> None:
    """Refuses names that a dictionary of options does not have, as Python does for keyword arguments."""
    for name in options.keys() - kind.__annotations__.keys():
        raise TypeError(
            f"there is no option '{name}': choose from {', '.join(kind.__annotations__)}"
        )


def settings_options(options: JobOptions) -> SettingsOptions:
    """Returns the options of a job that determine settings, texts and device."""
    names = SettingsOptions.__annotations__
    return cast(SettingsOptions, {name: value for name, value in options.items() if name in names})


def choose_settings(
    config: Any,
    device: torch.device,
    options: SettingsOptions,
    rule: AttentionRule | None = None,
) -> ConversionSettings:
    """Returns the settings given, or those of an effort, with changes made to them.

    Args:
        config: text configuration of the model.
        device: of the conversion.
        options: `settings`, `effort`, `max_length` and `changes` count.
        rule: attention rule of an artifact, whose window determines the lengths.

    Raises:
        RTPurboError: there is no such effort or setting, or a value is of the wrong type or out of range.
    """
    changes = dict(options.get("changes") or {})
    if "calibration.ratio" in changes:
        # A share that the user names is the share, not the smallest one.
        changes.setdefault("calibration.max_divergence", None)
    settings, max_length = options.get("settings"), options.get("max_length")
    resolved = resolve_effort(options.get("effort", "auto"), device.type)
    if settings is None:
        context = context_length(config)
        if rule is None:
            # The window determines the lengths, so it is changed before they are chosen.
            rule = default_rule(resolved, context)
            ours = {name: changes[name] for name in changes if name.startswith("attention.")}
            rule = change_settings(ConversionSettings(attention=rule), ours).attention
        head_dim = max(shape.head_dim for shape in convertible_shapes(config).values())
        settings = default_settings(
            resolved, context, head_dim=head_dim, max_length=max_length, rule=rule
        )
    elif max_length is not None:
        raise RTPurboError("max_length has no effect on given settings: change their lengths.")
    return change_settings(settings, changes)
