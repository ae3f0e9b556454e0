"""Arguments and options of several commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from rtpurbo.config import IndexSpace, Reading
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from rtpurbo.conversion.options import JobOptions

optional = partial(typer.Option, show_default=False)
"""Option without a default of its own: left out, it changes nothing."""

_heads_option = partial(optional, rich_help_panel="Retrieval heads")
_attention_option = partial(optional, rich_help_panel="Attention")
_indexer_option = partial(optional, rich_help_panel="Token indexer")
_training_option = partial(optional, rich_help_panel="Training")

Model = Annotated[
    str | None,
    typer.Argument(
        help="Name on the Hugging Face Hub or folder of the dense model. "
        "Default: SmolLM2-135M-Instruct, for a first try.",
        show_default=False,
    ),
]
Artifact = Annotated[
    str, typer.Argument(help="Folder that `rtpurbo convert` wrote, or its name on the Hub.")
]
OutputFolder = Annotated[
    Path, typer.Option("--output-dir", "-o", help="Output folder, written whole or not at all.")
]
Data = Annotated[
    list[str] | None,
    optional(
        help="Text: a .txt, .md, .jsonl, .jsonl.gz or .parquet file, or hf:NAME for a dataset of "
        "the Hub. Repeat it for several. Default: the documentation that comes with Python."
    ),
]
BaseModel = Annotated[
    str | None,
    optional(
        help="Base model to load instead of the one that the artifact names; it must have the same "
        "weights."
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is the GPU if there is one.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Dtype of the frozen base model; auto is the checkpoint's dtype on a GPU and float32 on a "
        "CPU. Trained weights are always float32."
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")
]

Ratio = Annotated[
    float | None,
    _heads_option(
        help="Share of retrieval heads among the query heads, or among the KV heads with "
        "calibration.granularity=kv_group. The paper uses 0.15 of the query heads; the default on a GPU is 0.4 of the "
        "KV heads, or more if answers need more."
    ),
]
Threshold = Annotated[
    float | None,
    _heads_option(help="Choose all heads with at least this retrieval score, instead of a share."),
]
Count = Annotated[int | None, _heads_option(help="Choose this many heads, instead of a share.")]
Effort = Annotated[
    Literal["auto", "quick", "standard", "thorough"],
    typer.Option(
        help="Default settings: quick for minutes on two CPU cores, standard for a GPU, thorough with "
        "more steps and longer sequences; auto is quick on a CPU and standard on a GPU."
    ),
]
MaxLength = Annotated[
    int | None,
    optional(
        help="Tokens of the longest training sequence. Default: set by --effort, at most the model's "
        "context."
    ),
]
Window = Annotated[
    int | None,
    _attention_option(
        help="Window in tokens. Default: an eighth of the model's context, less the heavy hitters."
    ),
]
TopP = Annotated[
    float | None,
    _attention_option(
        help="Attention mass that a retrieval head must select; higher values read more tokens."
    ),
]
ReadingOption = Annotated[
    Reading | None,
    _attention_option(
        "--reading",
        help="Distribution that top-p applies to: the indexer's estimate for all keys (paper), with exact "
        "mass for window and sinks (residual), or the distant keys alone (far).",
    ),
]
IndexSpaceOption = Annotated[
    IndexSpace | None,
    _indexer_option(
        "--index-space",
        help="States that the indexer projects: before RoPE (the paper), after RoPE, or only the "
        "low-frequency dimensions after RoPE.",
    ),
]
IndexDim = Annotated[
    int | None, _indexer_option(help="Dimensions of an index key, which is stored in the cache.")
]
Stage1Steps = Annotated[int | None, _training_option(help="Training steps of the indexers.")]
Stage2Steps = Annotated[
    int | None,
    _training_option(help="Steps of self-distillation; 0 leaves the model's weights unchanged."),
]
LoraRank = Annotated[
    int | None, _training_option(help="Rank of the LoRA of stage 2; 0 trains the full weights.")
]
Stream = Annotated[
    bool | None,
    _training_option(
        "--stream",
        help="Stream the texts of --data during training instead of loading them into memory.",
    ),
]
Parallel = Annotated[
    str,
    typer.Option(
        help="Parallelism of the processes that torchrun starts: data (each holds the whole model) or "
        "fsdp (the weights are sharded too).",
        rich_help_panel="Training",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    _training_option(
        help="Log metrics to an experiment tracker: tensorboard, wandb, trackio, ... Repeat it "
        "for several."
    ),
]


def _values_of_set(others: Sequence[str] | None) -> dict[str, Any]:
    """Values by dotted name of repeated NAME=VALUE options."""
    values = {}
    for assignment in others or []:
        name, found, text = assignment.partition("=")
        if not found:
            raise RTPurboError(f"--set {assignment} names no value: write NAME=VALUE.")
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            values[name] = text
    return values


def _checked_set(others: list[str] | None) -> list[str] | None:
    """Checks names and types of settings as soon as they are parsed, before a command imports torch."""
    from rtpurbo.settings import check_changes

    check_changes(_values_of_set(others))
    return others


Set = Annotated[
    list[str] | None,
    _training_option(
        "--set",
        metavar="NAME=VALUE",
        callback=_checked_set,
        help="Any other setting by its name, such as stage1.mixture.needles=0.4 or "
        "stage1.lengths=[4096,8192]; `rtpurbo.settings` describes them. Repeat it for several.",
    ),
]

_SETTINGS = {
    "ratio": "calibration.ratio",
    "threshold": "calibration.threshold",
    "count": "calibration.count",
    "window": "attention.sliding_window",
    "top_p": "attention.top_p",
    "reading": "attention.reading",
    "index_space": "indexer.index_space",
    "index_dim": "indexer.index_dim",
    "stage1_steps": "stage1.steps",
    "stage2_steps": "stage2.steps",
    "lora_rank": "stage2.lora_rank",
    "stream": "stream.enabled",
    "seed": "seed",
}
"""Dotted name of the setting that each option changes."""

_CHOICES_OF_HEADS = ("calibration.ratio", "calibration.threshold", "calibration.count")
"""Settings of the number of retrieval heads, which exclude each other."""


def suites_with_tasks(
    suites: Sequence[str], tasks: str | None, lengths: Sequence[int] | None
) -> list[str]:
    """Returns suites as arguments of `rtpurbo.evaluate`; a separate option may have the tasks of the only one.

    Lengths are those that the user gave; tasks of lm-eval use no others.
    """
    names = list(suites)
    if tasks is not None:
        if len(names) != 1 or ":" in names[0]:
            raise RTPurboError("--tasks needs one --suite that names no tasks itself.")
        suite, at, own_lengths = names[0].partition("@")
        names = [f"{suite}:{tasks}{at}{own_lengths}"]
    if lengths:
        written = ",".join(str(length) for length in lengths)
        names = [
            f"{name}@{written}" if name.startswith("lm-eval") and "@" not in name else name
            for name in names
        ]
    return names


def assignments(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """Returns repeated NAME=VALUE options as a dictionary."""
    values = {}
    for assignment in given or []:
        name, found, value = assignment.partition("=")
        if not found or not name or not value:
            raise RTPurboError(f"{option} {assignment} names no value: write NAME=VALUE.")
        values[name] = value
    return values


def job_options(context: typer.Context) -> JobOptions:
    """Returns keyword arguments for the functions of `rtpurbo.conversion`, without `progress`.

    Options of the command are those of `rtpurbo.conversion.options.JobOptions`, and some that each change one
    setting.
    """
    given = context.params
    settings = {name: given[name] for name in _SETTINGS if name in given}
    changes = changed_settings(given["others"], **settings)

    # Imports torch, which takes seconds.
    from rtpurbo.conversion.options import JobOptions

    shared = {name: given.get(name) for name in JobOptions.__annotations__}
    found = {name: value for name, value in shared.items() if value not in (None, (), [])}
    return cast(JobOptions, found | {"changes": changes})


def changed_settings(others: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """Returns the settings that the user changed, by dotted name, from the options of `_SETTINGS` and those of `--set`.

    Values of the latter are JSON, or plain text; options are None if not given.
    """
    changes = {_SETTINGS[name]: value for name, value in options.items() if value is not None}
    changes |= _values_of_set(others)
    given = [name for name in _CHOICES_OF_HEADS if changes.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(name.replace("calibration.", "--") for name in given)
        raise RTPurboError(
            f"{names} are mutually exclusive: choose retrieval heads by one of them."
        )
    return changes
