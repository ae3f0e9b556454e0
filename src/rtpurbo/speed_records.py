"""Speed as data: one record an entry of a table, with where it came from."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.version import library_commit

Phase = Literal["prefill", "decode", "model-prefill", "model-decode", "stage1", "stage2"]


@dataclass(frozen=True)
class SpeedRecord:
    """One measurement.

    Attributes:
        phase: what was timed: one layer's operator, a forward of a whole model, or a step of training.
        context_length: tokens, the new ones included.
        batch_size: sequences.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: KV heads of a layer.
        num_retrieval_heads: query heads of the layer, or of all layers of a model, that retrieve.
        head_dim: dimensions of a head.
        sliding_window: keys that a local head sees beside the sinks.
        density: share of the causal key blocks that retrieval heads read, near ones included; in
            decoding, of the keys that they select. 1 where they read everything. A density that was
            asked for is stated as such if it was nearly reached.
        implementation: who computed it.
        milliseconds: of a call, the median.
        milliseconds_p10: a tenth of the calls were faster.
        milliseconds_p90: a tenth of the calls were slower.
        retrieval_window: the window of retrieval heads.
        peak_memory_bytes: the most memory in use at once, inputs included.
        scratch_bytes: of these, what was neither there before the call nor its result.
        model: geometry of the model, if it was a whole one.
        tokens_per_second: of training.
        peak_memory_gib: the peak again, in GiB, of training.
        loss_milliseconds: of a training step, what computing the loss and its gradients took.
        loss_share: the same as a share of the step.
        dtype: dtype of the states or weights, as in "bfloat16"; None in files of earlier versions.
        device: the device, which a file states once for all records.
        note: what else to know.
    """

    phase: Phase
    context_length: int
    batch_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_retrieval_heads: int
    head_dim: int
    sliding_window: int
    density: float
    implementation: str
    milliseconds: float
    milliseconds_p10: float
    milliseconds_p90: float
    retrieval_window: int | None = None
    peak_memory_bytes: int | None = None
    scratch_bytes: int | None = None
    model: str | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    loss_milliseconds: float | None = None
    loss_share: float | None = None
    dtype: str | None = None
    device: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


REQUIRED = frozenset(item.name for item in fields(SpeedRecord) if item.default is MISSING)


@dataclass
class SpeedResults:
    """Results of a benchmark.

    Attributes:
        records: the measurements.
        notes: what was left out, and why.
        errors: what was refused a figure because it computed something wrong.
        origin: what a file says of where the records came from.
    """

    records: list[SpeedRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)


def write_speed(path: str | Path, device: str, command: str, results: SpeedResults) -> None:
    """Writes records with all that is needed to measure them again.

    Args:
        path: the JSON file.
        device: what it ran on.
        command: how to get the same results.
        results: the measurements.
    """
    write_json_atomically(
        path,
        {
            "device": device,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": version("torch"),
            "triton": _triton_version(),
            "commit": library_commit(),
            "command": command,
            "notes": [*results.errors, *results.notes],
            "records": [replace(record, device=None).to_dict() for record in results.records],
        },
    )


def read_speed(path: str | Path) -> SpeedResults:
    """Reads what `write_speed` wrote.

    Raises:
        RTPurboError: the file is missing, or not one of these.
    """
    path = Path(path)
    if not path.is_file():
        raise RTPurboError(f"there is no file of benchmarks {path}; check the path.")
    try:
        data = strict_json.read(path)
        device = data.get("device")
        records = [SpeedRecord(**{"device": device, **record}) for record in data.pop("records")]
        if any(record.phase not in get_args(Phase) for record in records):
            raise ValueError
        notes = data.pop("notes", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RTPurboError(f"{path} holds no benchmarks or is corrupt; measure again.") from error
    return SpeedResults(records, notes, origin=data)


def stated_density(asked: float, reached: float, tolerance: float) -> float:
    """The density that a record states: what was asked for if that was nearly reached.

    So measurements at several lengths can be told to belong together.

    Args:
        asked: what selections or lists were made for.
        reached: what they have.
        tolerance: share of what was asked for by which they may exceed it.
    """
    nearly = 0.95 * asked <= reached <= (1 + tolerance) * asked
    return asked if nearly else round(reached, 4)


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
