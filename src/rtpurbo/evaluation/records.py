"""Results files: records of measurements with their origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.samples import SampleRecord
from rtpurbo.files import write_json_atomically
from rtpurbo.version import __version__, library_commit

FORMAT_VERSION = 3
"""Files of formats 1 and 2 are read too: their records lack what is None by default."""


@dataclass(frozen=True)
class Record:
    """Measurement of a policy on a case.

    Attributes:
        suite: a name of `rtpurbo.evaluation.cases.SUITES`.
        task: of the suite, such as "single", "prose" or "niah_single_1".
        context_length: tokens; 0 where questions have their own length.
        policy: a name of `rtpurbo.evaluation.policies.POLICIES`.
        samples: number of questions or windows.
        score: correct answers in percent, or perplexity.
        far_tokens_read: share of the far tokens that selecting queries of retrieval heads read; None without
            far tokens.
        kv_bytes: bytes of the KV cache of a sequence of `context_length` tokens.
        ci95: 95 % bootstrap interval of the score.
        tokens_read_mean: mean number of tokens that these queries read, sinks and window included; see
            `rtpurbo.evaluation.reads.Reads`, as for the next five.
        tokens_read_p50: median.
        tokens_read_p95: 95th percentile.
        mass_kept: mean attention recall.
        measured_rows: number of measured queries, over all heads.
        far_tokens_histogram: number of queries that have far tokens, by far tokens read: none, 1, 2 to 3, 4 to
            7, and so on in powers of two.
        far_token_budget: far tokens that the policy may read per query; None without a budget.
        metric: name of the metric, if a suite has several.
        far_tokens_mean: mean number of far tokens read by queries that have any.
        far_rows: number of these queries.
    """

    suite: str
    task: str
    context_length: int
    policy: str
    samples: int
    score: float
    far_tokens_read: float | None = None
    kv_bytes: int | None = None
    ci95: tuple[float, float] | None = None
    tokens_read_mean: float | None = None
    tokens_read_p50: float | None = None
    tokens_read_p95: float | None = None
    mass_kept: float | None = None
    measured_rows: int = 0
    far_tokens_histogram: tuple[int, ...] | None = None
    far_token_budget: int | None = None
    metric: str | None = None
    far_tokens_mean: float | None = None
    far_rows: int | None = None


@dataclass(frozen=True)
class CaseResult:
    """Result of a policy on a case.

    Attributes:
        records: one per metric, at least one.
        samples: the questions with the model's answers.
    """

    records: list[Record]
    samples: list[SampleRecord]


@dataclass(frozen=True)
class Results:
    """A file of records.

    Attributes:
        origin: model, device, versions, conditions and command of the records.
        records: the measurements.
        averages: of suites, from their questions.
    """

    origin: dict[str, Any]
    records: list[Record]
    averages: list[Average]


def write_results(
    path: str | Path,
    model: str,
    device: str,
    command: str,
    records: Sequence[Record],
    extra: Mapping[str, Any] | None = None,
    averages: Sequence[Average] = (),
) -> None:
    """Writes records with everything that is needed to measure them again, and averages of them.

    The command gives the same results; `extra` says more about the origin.
    """
    write_json_atomically(
        path,
        {
            "format_version": FORMAT_VERSION,
            "model": model,
            "device": device,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "library_version": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "commit": library_commit(),
            "command": command,
            **(extra or {}),
            **({"averages": [asdict(average) for average in averages]} if averages else {}),
            "records": [asdict(record) for record in records],
        },
    )


def read_results(path: str | Path) -> Results:
    """Returns the results that `write_results` wrote.

    Raises:
        RTPurboError: the file is missing, corrupt or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise RTPurboError(f"there is no file of results {path}; check the path.")
    try:
        data = strict_json.read(path)
        if data["format_version"] < 1:
            raise ValueError("there is no such format")
        if data["format_version"] > FORMAT_VERSION:
            raise RTPurboError(
                f"{path} has results of format {data['format_version']}, but this rtpurbo "
                f"({__version__}) reads up to {FORMAT_VERSION}: upgrade rtpurbo."
            )
        records = [record_of_row(row) for row in data.pop("records")]
        averages = [Average(**_with_tuples(row)) for row in data.pop("averages", ())]
        if "resumption" in data:  # in files from before there were logs
            data["conditions"] = data.pop("resumption")["conditions"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RTPurboError(f"{path} holds no results or is corrupt; evaluate again.") from error
    return Results(data, records, averages)


def record_of_row(row: dict[str, Any]) -> Record:
    """Returns the record of a row of JSON."""
    return Record(**_with_tuples(row))


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of JSON with its lists as tuples."""
    return {name: tuple(item) if isinstance(item, list) else item for name, item in row.items()}
