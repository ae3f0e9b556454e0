"""What a report is made from: an artifact and files of results, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record, read_results
from rtpurbo.models.artifact import LOG_FILE, ArtifactConfig, find_artifact
from rtpurbo.speed_records import SpeedRecord, read_speed
from rtpurbo.training.log import TrainingLog


@dataclass(frozen=True)
class Origin:
    """Where results came from.

    Attributes:
        file: the name of their file.
        facts: what it says of model, device, versions, commit and command.
    """

    file: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Quality:
    """What was measured of one model, of one or more files.

    Attributes:
        model: as the files name it.
        records: the measurements; of two of the same thing, the later file's.
        cache_length: tokens at which every cache was weighed; None if each at its own.
        averages: of RULER's tasks, where the files have them.
    """

    model: str
    records: list[Record]
    cache_length: int | None = None
    averages: list[Average] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """A file of benchmarks: ratios are of medians of one run, so files are not mixed."""

    origin: Origin
    records: list[SpeedRecord]
    notes: list[str]


@dataclass
class Sources:
    """All that a report shows.

    Attributes:
        artifact: the sparse model, if one was given.
        curves: entries of its training log.
        quality: measurements of quality, by model.
        speed: benchmarks, by file.
        origins: of every file.
        remarks: what a reader has to know of how files were put together.
    """

    artifact: ArtifactConfig | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_sources(places: Iterable[str | Path]) -> Sources:
    """Reads what a report is made from.

    Args:
        places: files of results, told by their ending in .json, and at most one artifact: its folder
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
    sources.origins.append(Origin(file, facts))
    model, length = str(facts.get("model", file)), facts.get("kv_bytes_at")
    for place, known in enumerate(sources.quality):
        if (known.model, known.cache_length) == (model, length):
            merged = {_test(record): record for record in known.records}
            again = [record for record in records if _test(record) in merged]
            if again:
                sources.remarks.append(
                    f"{len(again)} measurements of {file} were in an earlier file too; {file} counts."
                )
            merged |= {_test(record): record for record in records}
            # A mean of what was measured again, or its distance from that, is not true any more.
            stale = {(record.suite, record.context_length) for record in again}
            kept = [
                item for item in known.averages if (item.suite, item.context_length) not in stale
            ]
            sources.quality[place] = Quality(
                model, list(merged.values()), length, [*kept, *averages]
            )
            return
    sources.quality.append(Quality(model, list(records), length, list(averages)))


def _read_file(path: Path, sources: Sources) -> None:
    kind = _kind(path)
    if kind == "quality":
        results = read_results(path)
        _check_numbers(path, results.records, ("score",))
        with_results(sources, path.name, results.origin, results.records, results.averages)
    else:
        speed = read_speed(path)
        _check_numbers(path, speed.records, ("milliseconds",))
        origin = Origin(path.name, speed.origin)
        sources.origins.append(origin)
        sources.speed.append(Speed(origin, speed.records, list(speed.notes)))


def _kind(path: Path) -> str:
    """Whether a file holds "quality" or "speed"; only the former has versions."""
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


def _test(record: Record) -> tuple[Any, ...]:
    return record.suite, record.task, record.metric, record.context_length, record.policy
