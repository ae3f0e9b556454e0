"""Figures that tables of the documentation must show, computed from the files in benchmarks/results.

A table that is preceded by `<!-- figures: NAME -->` is compared cell by cell with what `EXPECTED[NAME]` computes:
for each row, by the text of its first cell, the numbers of each later cell in their order. `None` is a cell
without numbers. Numbers are compared to the precision that is printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30

Numbers = Sequence[float] | None
Rows = dict[str, list[Numbers]]

_MARKER = re.compile(r"<!-- figures: (\w+) -->\n((?:\|.*\n)+)")
# A length such as 32K or a fraction such as 1/16 in a label is no figure; labels are not parsed.
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?|[+-]?\.\d+")


@dataclass(frozen=True)
class Table:
    """A marked table: the name in its marker, and its body rows as cells of text."""

    name: str
    rows: list[list[str]]


def cells(line: str) -> list[str]:
    """Splits a Markdown table row into its cells."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def marked_tables(text: str) -> Iterator[Table]:
    """Yields the tables that a `figures` marker precedes."""
    for match in _MARKER.finditer(text):
        lines = match[2].splitlines()
        yield Table(match[1], [cells(line) for line in lines[2:]])


def printed(cell: str) -> list[tuple[float, int]]:
    """Returns the numbers of a cell, each with its number of decimals."""
    found = []
    for text in _NUMBER.findall(cell):
        decimals = len(text.partition(".")[2])
        found.append((float(text.replace(",", "")), decimals))
    return found


def is_rounded(value: float, shown: float, decimals: int) -> bool:
    """True if `shown` is `value` rounded to that many decimals, ties either way."""
    return abs(value - shown) <= 0.5 * 10**-decimals + 1e-9


def label(cell: str) -> str:
    """Text of a label without its link, emphasis and code marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("*", "").replace("`", "").strip()


def read(name: str) -> dict[str, Any]:
    """Reads a file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def average_of(
    found: dict[str, Any], policy: str, length: int, suite: str = "ruler"
) -> dict[str, Any]:
    [average] = [
        one
        for one in found["averages"]
        if (one["suite"], one["context_length"], one["policy"]) == (suite, length, policy)
    ]
    return average


def _records(found: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [
        one
        for one in found["records"]
        if all(one.get(name) == value for name, value in values.items())
    ]


def _record(found: dict[str, Any], **values: Any) -> dict[str, Any]:
    [record] = _records(found, **values)
    return record


def _difference(average: dict[str, Any]) -> list[float]:
    return [average["difference"], *average["difference_ci95"]]


def _compared(
    found: dict[str, Any], length: int, suite: str = "ruler", policy: str = "rtpurbo"
) -> list[Numbers]:
    """Mean scores of the dense model and of a policy, and their difference with its interval."""
    full, other = (average_of(found, one, length, suite) for one in ("full", policy))
    return [[full["score"]], [other["score"]], _difference(other)]


def _far(found: dict[str, Any], policy: str, length: int, suite: str = "ruler") -> Numbers:
    """Mean share of the distant tokens that are read, over tasks, in percent."""
    shares = [
        one["far_tokens_read"]
        for one in _records(found, suite=suite, policy=policy, context_length=length)
        if one["far_tokens_read"] is not None
    ]
    return [100 * fmean(shares)] if shares else None


def _cache(found: dict[str, Any], policy: str, length: int) -> float:
    [size] = {one["kv_bytes"] for one in _records(found, policy=policy, context_length=length)}
    return size


PUBLIC = {
    "Qwen2.5-Coder-1.5B-Instruct": "quality-qwen2.5-coder-1.5b-instruct.json",
    "Qwen2.5-Coder-0.5B-Instruct": "quality-qwen2.5-coder-0.5b-instruct.json",
}
LENGTHS = {"4K": 4096, "8K": 8192, "16K": 16384, "32K": 32768, "64K": 65536}
CONTEXTS = {"32K": 2**15, "128K": 2**17, "256K": 2**18, "512K": 2**19, "1M": 2**20}


def public_models() -> Rows:
    rows: Rows = {}
    for model, name in PUBLIC.items():
        found = read(name)
        rows[model] = [
            *_compared(found, 32768),
            _far(found, "rtpurbo", 32768),
            [_cache(found, "full", 32768) / MIB],
            [_cache(found, "rtpurbo", 32768) / MIB],
        ]
    return rows


SUITES = {
    "BABILong qa2 to qa5, 16K": ("babilong", 16384),
    "BABILong qa2 to qa5, 32K": ("babilong", 32768),
    "GSM8K": ("gsm8k", 0),
    "MMLU-Pro": ("mmlu_pro", 0),
    "HumanEval": ("humaneval", 0),
}


def public_lengths() -> Rows:
    return {
        f"{_size(model)}, {name}": _at_length(read(file), length)
        for model, file in PUBLIC.items()
        for name, length in LENGTHS.items()
        if length <= 32768
    }


def _at_length(found: dict[str, Any], length: int) -> list[Numbers]:
    return [
        *_compared(found, length),
        _far(found, "rtpurbo", length),
        [_cache(found, "rtpurbo", length) / _cache(found, "full", length)],
    ]


def _size(model: str) -> str:
    return model.split("-")[2]


def public_suites() -> Rows:
    rows: Rows = {}
    for model, file in PUBLIC.items():
        found = read(file)
        for name, (suite, length) in SUITES.items():
            if _records(found, suite=suite, context_length=length):
                samples = average_of(found, "rtpurbo", length, suite)["samples"]
                rows[f"{_size(model)}, {name}"] = [[samples], *_compared(found, length, suite)]
    return rows


def public_tasks() -> Rows:
    files = [read(name) for name in PUBLIC.values()]
    tasks = dict.fromkeys(one["task"] for one in _records(files[0], suite="ruler"))
    return {
        task: [
            [
                _record(found, task=task, policy=policy, context_length=length)["score"]
                for policy in ("full", "rtpurbo")
            ]
            for found in files
            for length in (16384, 32768)
        ]
        for task in tasks
    }


def public_speed() -> Rows:
    found = read("model-qwen2.5-coder-1.5b-h200.json")
    rows: Rows = {}
    for name, ours, values in (
        ("decode step, batch 1", "rtpurbo", {"phase": "model-decode", "batch_size": 1}),
        ("decode step, batch 16", "rtpurbo", {"phase": "model-decode", "batch_size": 16}),
        ("prefill, batch 1", "rtpurbo-dense-retrieval", {"phase": "model-prefill"}),
    ):
        flash, cudnn, sparse = (
            _times(found, one, **values) for one in ("sdpa-flash", "sdpa-cudnn", ours)
        )
        density = _record(found, implementation=ours, **values)["density"]
        rows[name] = [
            [flash], [cudnn], [sparse], [min(flash, cudnn) / sparse], [100 * density]
        ]  # fmt: skip
    return rows


def memory() -> Rows:
    found = read("memory-h200.json")
    names = {"qwen3-8b": "Qwen3-8B", "qwen3-14b": "Qwen3-14B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
    rows: Rows = {}
    for shape, name in names.items():
        stages = {one["stage"]: one for one in found["records"] if one["shape"] == shape}
        order = [stages[stage] for stage in ("calibrate", "stage1", "top-p")]
        rows[name] = [
            [order[0]["weights_gib"]],
            *([one["peak_allocated_gib"]] for one in order),
            *([one["minutes"]] for one in order),
            [sum(one["minutes"] for one in order)],
        ]
    return rows


def long_context() -> Rows:
    found = read("quality-smollm2-64k-h200.json")
    rows: Rows = {}
    for name, length in LENGTHS.items():
        size = _cache(found, "rtpurbo", length)
        rows[name] = [
            *_compared(found, length),
            _far(found, "rtpurbo", length) if length > 4096 else None,
            [size / MIB],
            [size / _cache(found, "full", length)],
        ]
    return rows


CONTROLS = {
    "rtpurbo": "rtpurbo",
    "rtpurbo-before-stage2": "rtpurbo-before-stage2",
    "dense-heads": "dense-heads (retrieval heads read everything)",
    "top-k": "top-k by the same index, same mean budget",
    "rtpurbo-paper": "rtpurbo-paper (the paper's top-p)",
    "quest": "quest page bounds, same mean budget",
    "random-heads": "random-heads, reading everything",
    "local-only": "local-only (windows alone)",
}


def controls() -> Rows:
    found = read("quality-smollm2-64k-controls-h200.json")
    return {
        text: [
            *(_difference(average_of(found, policy, length)) for length in (8192, 16384, 32768)),
            _far(found, policy, 32768),
        ]
        for policy, text in CONTROLS.items()
    }


def public_controls() -> Rows:
    found = read("quality-qwen2.5-coder-1.5b-controls-16k-h200.json")
    measured = {one["policy"] for one in found["averages"]}
    return {
        text: [*_compared(found, 16384, policy=policy), _far(found, policy, 16384)]
        for policy, text in CONTROLS.items()
        if policy in measured
    }


def recipe_means() -> Rows:
    found = read("quality-smollm2-64k-h200.json")
    full = [average_of(found, "full", length) for length in LENGTHS.values()]
    sparse = [average_of(found, "rtpurbo", length) for length in LENGTHS.values()]
    sizes = [
        _cache(found, "rtpurbo", length) / _cache(found, "full", length)
        for length in LENGTHS.values()
    ]
    read_far = [
        fmean(
            one["far_tokens_mean"]
            for one in _records(found, policy="rtpurbo", context_length=length)
        )
        for length in LENGTHS.values()
        if length > 4096
    ]
    return {
        "full": [[one["score"]] for one in full],
        "rtpurbo": [[one["score"]] for one in sparse],
        "difference": [_difference(one) for one in sparse],
        "KV cache, of the dense one": [[size] for size in sizes],
        "distant tokens read per query, mean over tasks": [
            None,
            *([round(one, -1)] for one in read_far),
        ],
    }


def recipe_policies() -> Rows:
    found = read("quality-smollm2-64k-controls-h200.json")
    labels = {
        "rtpurbo": "rtpurbo",
        "rtpurbo-before-stage2": "before stage 2",
        "dense-heads": "dense retrieval heads",
        "top-k": "top-k, same mean budget",
        "rtpurbo-paper": "the paper's reading of top-p",
        "quest": "quest, same mean budget",
        "random-heads": "random heads that read everything",
        "local-only": "windows alone",
    }
    without_4k = ("top-k", "quest")
    return {
        text: [
            None if policy in without_4k else _difference(average_of(found, policy, 4096)),
            *(_difference(average_of(found, policy, length)) for length in (8192, 16384, 32768)),
            _far(found, policy, 32768),
        ]
        for policy, text in labels.items()
    }


def smollm2() -> Rows:
    found = read("quality-smollm2-135m-instruct.json")
    policies = dict.fromkeys(one["policy"] for one in found["records"])
    tests = [(task, length) for task in ("single", "multikey") for length in (2048, 4096, 7500)]
    tests += [("prose", 2048), ("prose", 8192)]
    return {
        policy: [
            *(
                [_record(found, policy=policy, task=task, context_length=length)["score"]]
                for task, length in tests
            ),
            _far(found, policy, 8192, "perplexity"),
            [_cache(found, policy, 8192) / MIB],
        ]
        for policy in policies
    }


def _times(found: dict[str, Any], implementation: str, **values: Any) -> float:
    return _record(found, implementation=implementation, **values)["milliseconds"]


def model_speed() -> Rows:
    decode, prefill = read("model-decode-h100.json"), read("model-prefill-h100.json")

    def row(
        found: dict[str, Any], scale: float, ours: str, phase: str, length: int
    ) -> list[Numbers]:
        flash, cudnn, sparse = (
            _times(found, name, phase=phase, context_length=length)
            for name in ("sdpa-flash", "sdpa-cudnn", ours)
        )
        return [[flash * scale], [cudnn * scale], [sparse * scale], [min(flash, cudnn) / sparse]]

    return {
        "decode step, 128K": row(decode, 1, "rtpurbo", "model-decode", 2**17),
        "decode step, 256K": row(decode, 1, "rtpurbo", "model-decode", 2**18),
        "prefill, 128K, dense retrieval heads (default)": row(
            prefill, 1e-3, "rtpurbo-dense-retrieval", "model-prefill", 2**17
        ),
        "prefill, 128K, 10 % of the key blocks": row(
            prefill, 1e-3, "rtpurbo", "model-prefill", 2**17
        ),
    }


def layer_prefill() -> Rows:
    dense, every, again = map(
        read, ("prefill-h100.json", "prefill-every-row-h100.json", "prefill-dense-h100.json")
    )
    rows: Rows = {}
    for name, length in CONTEXTS.items():
        if name == "256K":
            continue
        flash, cudnn = (
            _times(dense, peer, context_length=length) for peer in ("sdpa-flash", "sdpa-cudnn")
        )
        sparse = _times(every, "rtpurbo", context_length=length)
        rows[name] = [[flash], [cudnn], [sparse], [flash / sparse], [cudnn / sparse], None, None]
        if _records(again, context_length=length):
            retrieval = _times(again, "rtpurbo-dense-retrieval", context_length=length)
            flash = _times(again, "sdpa-flash", context_length=length)
            rows[name][-2:] = [[retrieval], [flash / retrieval]]
    return rows


def layer_decode() -> Rows:
    found = read("decode-h100.json")
    rows: Rows = {}
    for name, length, batch in (
        ("32K", 2**15, 1), ("128K", 2**17, 1), ("512K", 2**19, 1), ("1M", 2**20, 1), ("128K", 2**17, 8),
    ):  # fmt: skip
        flash, cudnn, ours, float8 = (
            1000 * _times(found, one, context_length=length, batch_size=batch)
            for one in ("sdpa-flash", "sdpa-cudnn", "rtpurbo", "rtpurbo-float8-index")
        )
        rows[f"{name}, {batch}"] = [
            [flash], [cudnn],
            [ours], [flash / ours], [cudnn / ours],
            [float8], [flash / float8], [cudnn / float8],
        ]  # fmt: skip
    return rows


def serving() -> Rows:
    records = {
        (record["policy"], record["context_length"], record["concurrency"]): record
        for record in read("serve-h200.json")["records"]
    }
    rows: Rows = {}
    for name, length, batch in (
        ("4K", 2**12, 1), ("32K", 2**15, 1), ("128K", 2**17, 1), ("256K", 2**18, 1),
        ("32K, 16 at once", 2**15, 16), ("128K, 6 at once", 2**17, 6),
    ):  # fmt: skip
        dense, sparse = (records[policy, length, batch] for policy in ("full", "rtpurbo"))
        row: list[Numbers] = []
        for field, unit in (("last_first_token_ms", 1000), ("time_per_output_token_ms", 1)):
            row += [[dense[field] / unit], [sparse[field] / unit], [dense[field] / sparse[field]]]
        rows[name] = row
    return rows


def training() -> Rows:
    found = read("training-h100.json")

    def row(phase: str, implementation: str, length: int) -> list[Numbers]:
        one = _record(found, phase=phase, implementation=implementation, context_length=length)
        return [[length], [one["milliseconds"] / 1000], [one["peak_memory_gib"]]]

    return {
        "stage 1": row("stage1", "rtpurbo", 49152),
        "stage 1, loss in plain PyTorch": row("stage1", "eager", 49152),
        "stage 1 at 128K": row("stage1", "rtpurbo", 131072),
        "stage 2, LoRA of rank 16": row("stage2", "rtpurbo", 32768),
    }


def sparse_prefill() -> Rows:
    files = [read(f"sparse-prefill-{name}-h100.json") for name in ("8k", "8k-of-32k", "32k")]
    rows: Rows = {}
    for share in ("1/16", "1/8", "1/4"):
        row: list[Numbers] = []
        for found in files:
            dense = _record(found, rule="dense retrieval heads, in the answer too")["right"]
            lists = _record(found, rule=f"row_peak {share}")["right"]
            for task in ("4 values", "variables"):
                pairs = zip(lists[task], dense[task], strict=False)
                row.append([100 * fmean(a - b for a, b in pairs)])
        rows[share] = row
    return rows


EXPECTED: dict[str, Callable[[], Rows]] = {
    make.__name__: make
    for make in (
        public_models, public_lengths, public_suites, public_tasks, public_speed, memory, long_context,
        public_controls, controls, smollm2, model_speed, layer_prefill, layer_decode, serving, training, sparse_prefill,
        recipe_means, recipe_policies,
    )
}  # fmt: skip


def wrong_cells(table: Table, expected: Rows) -> Iterator[str]:
    """Yields a sentence for each row or cell of a table that differs from what is expected."""
    shown = [label(row[0]) for row in table.rows]
    if sorted(shown) != sorted(expected):
        yield f"{table.name}: the rows are {shown}, expected {list(expected)}"
        return
    for row, name in zip(table.rows, shown, strict=True):
        values = expected[name]
        if len(row) - 1 != len(values):
            yield f"{table.name}, {name}: {len(row) - 1} cells, expected {len(values)}"
            continue
        for cell, numbers in zip(row[1:], values, strict=True):
            yield from _wrong_numbers(f"{table.name}, {name}", cell, numbers or [])


def _wrong_numbers(place: str, cell: str, numbers: Iterable[float]) -> Iterator[str]:
    given, numbers = printed(cell), list(numbers)
    right = len(given) == len(numbers) and all(
        is_rounded(value, *one) for value, one in zip(numbers, given, strict=True)
    )
    if not right:
        yield f"{place}: '{cell}', expected {[round(value, 4) for value in numbers]}"
