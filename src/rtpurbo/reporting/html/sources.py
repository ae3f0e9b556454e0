"""Data of a report: an artifact and files of results, read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record, read_results
from rtpurbo.models.artifact_config import LOG_FILE, ArtifactConfig, find_artifact
from rtpurbo.reporting.cache_sizes import read_cache_shape
from rtpurbo.speed_records import SpeedRecord, read_speed
from rtpurbo.training.log import TrainingLog

Test = tuple[str, str, str | None, int, str]
"""Suite, task, metric, context length and policy."""


@dataclass(frozen=True)
class Origin:
    """Provenance of results.

    Attributes:
        file: name of their file.
        facts: its entries on model, device, versions, commit and command.
    """

    file: str
    facts: dict[str, Any]

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.facts.get("device", "device not recorded"))

    @property
    def dtype(self) -> str:
        """The dtype of weights: the file's entry, else the command's option."""
        if isinstance(self.facts.get("dtype"), str):
            return str(self.facts["dtype"])
        found = set(re.findall(r"--dtype[= ](\w+)", str(self.facts.get("command", ""))))
        return found.pop() if len(found) == 1 and "auto" not in found else "dtype not recorded"

    @property
    def where(self) -> str:
        """Device and dtype, for captions."""
        return f"{self.device}, {self.dtype}"


@dataclass(frozen=True)
class Quality:
    """Measurements of one model, of one or more files.

    Attributes:
        model: as the files name it.
        records: the measurements; of two of the same test, the later file's.
        cache_length: tokens at which every cache size was measured; None for each record's length.
        averages: of suites, where the files have them.
        origins: provenance of each record, by its test.
    """

    model: str
    records: list[Record]
    cache_length: int | None = None
    averages: list[Average] = field(default_factory=list)
    origins: dict[Test, Origin] = field(default_factory=dict)

    def where(self, records: Sequence[Record], samples: bool = True) -> str:
        """Returns samples, device and dtype of some records, for captions."""
        counts = sorted({record.samples for record in records})
        counted = [f"{low:,}" for low in sorted({counts[0], counts[-1]})] if counts else []
        origins = [
            self.origins[_test(record)] for record in records if _test(record) in self.origins
        ]
        parts = [f"{' to '.join(counted)} samples per test"] if samples and counted else []
        parts += [" or ".join(dict.fromkeys(origin.where for origin in origins))] if origins else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Speed:
    """A file of benchmarks. Speedups are ratios within one run, so files are not mixed."""

    origin: Origin
    records: list[SpeedRecord]
    notes: list[str]


@dataclass
class Sources:
    """Data of a report.

    Attributes:
        artifact: the sparse model, if one was given.
        head_dim: dimensions of its heads, if the artifact records them.
        curves: entries of its training log.
        quality: measurements of quality, by model.
        speed: benchmarks, by file.
        origins: of every file.
        remarks: sentences on how files were merged.
    """

    artifact: ArtifactConfig | None = None
    head_dim: int | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_sources(places: Iterable[str | Path]) -> Sources:
    """Reads the data of a report.

    Args:
        places: files of results, whose names end in .json, and at most one artifact: its folder
            or its name on the Hub.

    Raises:
        RTPurboError: nothing was named, two artifacts were, or one of them is missing, broken, newer
            than this library or something else.
    """
    sources = Sources()
    for place in places:
        if str(place).endswith(".json") and not Path(place).is_dir():
            _read_file(Path(place), sources)
        elif Path(place).is_file():
            raise RTPurboError(
                f"{place} is neither an artifact's folder nor a file of results, which ends in .json."
            )
        elif sources.artifact is not None:
            raise RTPurboError(f"a report is about one artifact, but {place} is a second one.")
        else:
            folder = find_artifact(place)
            sources.artifact = ArtifactConfig.read(folder)
            shape = read_cache_shape(folder)
            converted = sources.artifact.config.head_map.converted_layers
            sources.head_dim = shape.head_dim_of(converted[0]) if shape and converted else None
            sources.curves = list(TrainingLog(folder / LOG_FILE).entries())
    if sources.artifact is None and not sources.origins:
        raise RTPurboError(
            "there is nothing to report: name an artifact, files of results, or both."
        )
    return sources


def with_results(
    sources: Sources,
    file: str,
    facts: dict[str, Any],
    records: Sequence[Record],
    averages: Sequence[Average] = (),
) -> None:
    """Adds measurements of quality to those of the same model."""
    origin = Origin(file, facts)
    sources.origins.append(origin)
    model, length = str(facts.get("model", file)), facts.get("kv_bytes_at")
    same = (one for one in sources.quality if (one.model, one.cache_length) == (model, length))
    quality = next(same, None)
    if quality is None:
        quality = Quality(model, [], length)
        sources.quality.append(quality)
    merged = {_test(record): record for record in quality.records}
    again = [record for record in records if _test(record) in merged]
    if again:
        sources.remarks.append(
            f"{len(again)} measurements of {file} are in an earlier file too; {file} counts."
        )
    # A mean over replaced records, or its difference from them, no longer holds.
    stale = {(record.suite, record.context_length) for record in again}
    kept = [one for one in quality.averages if (one.suite, one.context_length) not in stale]
    merged |= {_test(record): record for record in records}
    quality.records[:], quality.averages[:] = merged.values(), [*kept, *averages]
    quality.origins.update(dict.fromkeys(map(_test, records), origin))


def _read_file(path: Path, sources: Sources) -> None:
    kind = _kind(path)
    if kind == "quality":
        results = read_results(path)
        _check_numbers(path, results.records, ("score",))
        facts = dict(results.origin)
        facts = {"dtype": facts.pop("conditions", {}).get("dtype"), **facts}
        with_results(sources, path.name, facts, results.records, results.averages)
    else:
        speed = read_speed(path)
        _check_numbers(path, speed.records, ("milliseconds",))
        origin = Origin(path.name, speed.origin)
        sources.origins.append(origin)
        sources.speed.append(Speed(origin, speed.records, list(speed.notes)))


def _kind(path: Path) -> str:
    """Returns "quality" or "speed" by the content of a file; only the former has versions."""
    if not path.is_file():
        raise RTPurboError(f"there is no file of results {path}; check the path.")
    try:
        data = strict_json.read(path)
    except (ValueError, OSError) as error:
        raise RTPurboError(f"{path} is not JSON or is truncated; measure again.") from error
    if isinstance(data, dict) and "format_version" in data and "records" in data:
        return "quality"
    records = data.get("records") if isinstance(data, dict) else None
    first = records[0] if isinstance(records, list) and records else None
    if isinstance(first, dict) and {"phase", "milliseconds"} <= first.keys():
        return "speed"
    raise RTPurboError(f"{path} holds results neither of `rtpurbo eval` nor of `rtpurbo bench`.")


def _check_numbers(path: Path, records: Sequence[Any], fields: Sequence[str]) -> None:
    for record in records:
        for name in ("context_length", *fields):
            value = getattr(record, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            # Questions of some suites have their own length, which is recorded as 0.
            may_be_zero = name == "score" or getattr(record, "suite", None) in SHORT
            if not number or (not may_be_zero and value <= 0):
                raise RTPurboError(f"{path} is corrupt: a record's {name} is {value!r}.")


def _test(record: Record) -> Test:
    return record.suite, record.task, record.metric, record.context_length, record.policy
