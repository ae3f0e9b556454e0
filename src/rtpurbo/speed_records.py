"""Records of speed measurements and their files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.version import installed_version, library_commit

Phase = Literal["prefill", "decode", "model-prefill", "model-decode", "stage1", "stage2"]


@dataclass(frozen=True)
class SpeedRecord:
    """Speed measurement.

    Attributes:
        phase: kind of measurement: operator of a layer, forward pass of a whole model, or training step.
        context_length: tokens, new ones included.
        batch_size: number of sequences.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: KV heads of a layer.
        num_retrieval_heads: retrieval heads of the layer, or of all layers of a model.
        head_dim: dimensions of a head.
        sliding_window: window of local heads, without sinks.
        density: share of the causal key blocks that retrieval heads read, near ones included; in
            decoding, share of the keys that they select; 1 for dense heads. The requested density if it
            was nearly reached.
        implementation: name of the implementation.
        milliseconds: median time of a call.
        milliseconds_p10: 10th percentile.
        milliseconds_p90: 90th percentile.
        retrieval_window: window of retrieval heads.
        peak_memory_bytes: peak memory, inputs included.
        scratch_bytes: part of the peak that was neither allocated before the call nor is its result.
        model: geometry of a whole model, or the name of an artifact.
        tokens_per_second: speed of training, or of the decode steps of a whole model.
        memory_gb: memory in GB (1e9 bytes) that holds `batch_size` sequences and the weights.
        peak_memory_gib: peak memory of training in GiB.
        loss_milliseconds: time of the loss and its gradients in a training step.
        loss_share: the same as a share of the step.
        dtype: dtype of the states or weights, as in "bfloat16"; None in files of earlier versions.
        usual_milliseconds: median of earlier results of the same implementation and task on the device, if
            the time is far off it.
        device: device, which a file states once for all records.
        note: further remarks.
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
    memory_gb: float | None = None
    peak_memory_gib: float | None = None
    loss_milliseconds: float | None = None
    loss_share: float | None = None
    dtype: str | None = None
    usual_milliseconds: float | None = None
    device: str | None = None
    note: str | None = None

    @property
    def task(self) -> tuple[Any, ...]:
        """Work that was measured and its device: records of one task can be compared."""
        return (
            self.phase,
            self.model or "",
            self.device or "",
            self.dtype or "",
            self.batch_size,
            self.context_length,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types without fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class SpeedResults:
    """Results of a benchmark.

    Attributes:
        records: the measurements.
        notes: reasons for measurements that were left out.
        errors: results that are not recorded because they are wrong.
        origin: provenance of the records, from their file.
    """

    records: list[SpeedRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)


def write_speed(path: str | Path, device: str, command: str, results: SpeedResults) -> None:
    """Writes records with everything that is needed to reproduce them.

    Args:
        path: JSON file.
        device: name of the device.
        command: command that reproduces the results.
        results: measurements.
    """
    write_json_atomically(
        path,
        {
            "device": device,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": version("torch"),
            "triton": installed_version("triton"),
            "commit": library_commit(),
            "command": command,
            "notes": [*results.errors, *results.notes],
            "records": [replace(record, device=None).to_dict() for record in results.records],
        },
    )


def read_speed(path: str | Path) -> SpeedResults:
    """Returns the results that `write_speed` wrote.

    Raises:
        RTPurboError: the file is missing or corrupt.
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


def usual_times(folder: str | Path) -> dict[tuple[Any, ...], float]:
    """Median times of earlier results, for `Session`.

    Records that are far off their usual time themselves are left out.

    Args:
        folder: folder of files that `write_speed` wrote, and others; it need not exist.

    Returns:
        Milliseconds by implementation and task.
    """
    times: dict[tuple[Any, ...], list[float]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            records = read_speed(path).records
        except RTPurboError:  # results of another kind
            continue
        for record in records:
            if record.usual_milliseconds is None:
                # Files of earlier versions state no dtype, which is this one.
                record = replace(record, dtype=record.dtype or "bfloat16")
                times.setdefault((record.implementation, *record.task), []).append(
                    record.milliseconds
                )
    return {key: median(found) for key, found in times.items()}


def stated_density(asked: float, reached: float, tolerance: float) -> float:
    """Returns the density of a record: the requested one if it was nearly reached.

    Measurements at several lengths can thus be grouped by density.

    Args:
        asked: requested density.
        reached: actual density.
        tolerance: share of the requested density by which it may be exceeded.
    """
    nearly = 0.95 * asked <= reached <= (1 + tolerance) * asked
    return asked if nearly else round(reached, 4)
