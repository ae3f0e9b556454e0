"""One run of a benchmark: entries are checked, timed and recorded, or skipped with a note."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rtpurbo.benchmarks.timing import SLOW, Call, Clock, Measurement, clock_of, measure
from rtpurbo.devices import device_name
from rtpurbo.errors import RTPurboError
from rtpurbo.speed_records import SpeedRecord, SpeedResults

# A peer's time may be off its usual one by this factor; it is measured again this many times if it is slower.
TOLERANCE = 1.25
RETRIES = 2

# Allocates inputs and returns the call to time; the inputs are freed with the call.
Prepare = Callable[[], Call]


@dataclass
class Entry:
    """One implementation on one input, to be measured.

    Attributes:
        implementation: name in records.
        variants: ways to run it, by name, of which the fastest is recorded.
        facts: fields of the record that are known before the measurement.
        check: compares the result of the prepared call with a reference; returns an error or None.
        is_ours: failures are errors of the run, not notes.
        growth: exponent with which the time grows with the context length.
        calls: layers or steps that one call runs; times are divided by it.
        result_bytes: size of a call's result.
        note: text for the record.
        figures: computes further fields of the record from the measurement.
    """

    implementation: str
    variants: Mapping[str, Prepare]
    facts: dict[str, Any]
    check: Callable[[Call], str | None] | None = None
    is_ours: bool = False
    growth: int = 2
    calls: int = 1
    result_bytes: int = 0
    note: str = ""
    figures: Callable[[Measurement], dict[str, Any]] | None = None

    @property
    def title(self) -> str:
        """Name in log lines."""
        facts = self.facts
        title = f"{facts['phase']} {self.implementation} at {facts['context_length']:,} tokens"
        if facts["batch_size"] > 1:
            title += f" x {facts['batch_size']}"
        return title + (f", density {facts['density']:.3g}" if facts["density"] < 1 else "")


@dataclass
class Session:
    """Measures entries in turn and collects the results.

    Attributes:
        device: device to measure on.
        repeats: largest number of timed calls of an entry.
        time_limit: seconds; other implementations expected to take longer per call are skipped.
        wanted: implementations to measure; empty for all.
        log: receives a line per entry.
        on_record: receives the results so far after every record.
        clock: replaces the clock of the device.
        usual: milliseconds that peers took before, by implementation and `SpeedRecord.task`.
        results: records, notes and errors so far.
    """

    device: torch.device
    repeats: int = 20
    time_limit: float = 60.0
    wanted: tuple[str, ...] = ()
    log: Callable[[str], None] = lambda text: None
    on_record: Callable[[SpeedResults], None] | None = None
    clock: Clock | None = None
    usual: Mapping[tuple[Any, ...], float] = field(default_factory=dict)
    results: SpeedResults = field(default_factory=SpeedResults)
    _seen: dict[Any, tuple[int, float, str]] = field(default_factory=dict)

    def wants(self, implementation: str) -> bool:
        """Returns True if an implementation is to be measured."""
        return not self.wanted or implementation in self.wanted

    def run(self, entry: Entry) -> None:
        """Measures an entry, or logs why it was skipped."""
        if not self.wants(entry.implementation):
            return
        expected = self._expected(entry)
        if not entry.is_ours and expected > 1000 * self.time_limit:
            self.note(
                f"{entry.title} skipped: it would take about {expected / 1000:.0f} s per call, "
                f"more than --time-limit {self.time_limit:g}"
            )
            return
        record = self._fastest(entry, expected)
        if record is None:
            return
        usual = self.usual.get((record.implementation, *record.task))
        if usual is not None and not entry.is_ours:
            record = self._compared(entry, record, usual, expected)
        self.results.records.append(record)
        self.log(f"{entry.title}: {record.milliseconds:.4g} ms")
        if self.on_record is not None:
            self.on_record(self.results)

    def _compared(
        self, entry: Entry, record: SpeedRecord, usual: float, expected: float
    ) -> SpeedRecord:
        """Measures a peer again that is slower than usual, and flags its record if it is far off."""
        for _ in range(RETRIES):
            if record.milliseconds <= TOLERANCE * usual:
                break
            self.log(f"{entry.title}: {record.milliseconds:.4g} ms is slow; measuring again")
            again = self._fastest(entry, expected)
            if again is not None and again.milliseconds < record.milliseconds:
                record = again
        if 1 / TOLERANCE <= record.milliseconds / usual <= TOLERANCE:
            return record
        self.note(
            f"{entry.title} is far off its usual time: {record.milliseconds:.4g} ms instead of "
            f"{usual:.4g} ms"
        )
        return replace(record, usual_milliseconds=usual)

    def _fastest(self, entry: Entry, expected: float) -> SpeedRecord | None:
        """Record of the fastest variant of an entry; None if none can be measured, or one is wrong."""
        best: tuple[Measurement, str] | None = None
        for name, prepare in self._order(entry, expected):
            try:
                found = self._measure(entry, prepare)
            except RTPurboError:
                raise
            except Exception as error:
                title = f"{entry.title} ({name})" if len(entry.variants) > 1 else entry.title
                self._fail(title, error, entry.is_ours)
                continue
            finally:
                release(self.device)
            if found is None:
                return None
            if best is None or found.milliseconds < best[0].milliseconds:
                best = found, name
            if found.milliseconds * entry.calls >= SLOW:
                break  # slow: do not time the other variants
        return None if best is None else self._record_of(entry, *best)

    @contextmanager
    def guarded(self, title: str) -> Iterator[None]:
        """Context manager that records exceptions as errors of the run, which continues."""
        try:
            yield
        except RTPurboError:
            raise
        except Exception as error:
            self._fail(title, error, is_ours=True)

    def _order(self, entry: Entry, expected: float) -> list[tuple[str, Prepare]]:
        """Variants to time; of a slow entry, only the one that was fastest at the last length."""
        variants = list(entry.variants.items())
        if expected >= SLOW and len(variants) > 1:
            fastest = self._seen[self._key(entry)][2]
            variants = [item for item in variants if item[0] == fastest]
        return variants

    def _measure(self, entry: Entry, prepare: Prepare) -> Measurement | None:
        call = prepare()
        if entry.check is not None:
            complaint = entry.check(call)
            release(self.device)
            if complaint is not None:
                self.results.errors.append(f"{entry.title} is not recorded: {complaint}.")
                self.log(self.results.errors[-1])
                return None
        clock = self.clock or clock_of(self.device)
        found = measure(call, clock, self.repeats, result_bytes=entry.result_bytes)
        return found.per(entry.calls)

    def _record_of(self, entry: Entry, found: Measurement, variant: str) -> SpeedRecord:
        self._seen[self._key(entry)] = (
            entry.facts["context_length"],
            found.milliseconds * entry.calls,
            variant,
        )
        remarks = [
            entry.note,
            variant if len(entry.variants) > 1 else "",
            "measured once" if found.repeats == 1 else "",
        ]
        return SpeedRecord(
            implementation=entry.implementation,
            **{name: value for name, value in vars(found).items() if name != "repeats"},
            device=device_name(self.device),
            note="; ".join(filter(None, remarks)) or None,
            **entry.facts,
            **({} if entry.figures is None else entry.figures(found)),
        )

    def _key(self, entry: Entry) -> tuple[Any, ...]:
        names = ("phase", "batch_size", "sliding_window", "density")
        return entry.implementation, *(entry.facts[name] for name in names)

    def _expected(self, entry: Entry) -> float:
        """Expected milliseconds of a call, extrapolated from a shorter context; 0 if unknown."""
        if self._key(entry) not in self._seen:
            return 0.0
        length, milliseconds, _ = self._seen[self._key(entry)]
        return milliseconds * math.pow(entry.facts["context_length"] / length, entry.growth)

    def _fail(self, title: str, error: Exception, is_ours: bool) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        text = f"{title} skipped: {reason}"
        if is_ours and not isinstance(error, torch.OutOfMemoryError):
            self.results.errors.append(f"{text}.")
            self.log(self.results.errors[-1])
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Adds a note to the results, and logs it."""
        self.results.notes.append(f"{text}.")
        self.log(self.results.notes[-1])


def release(device: torch.device) -> None:
    """Frees unused memory for the next entry."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
