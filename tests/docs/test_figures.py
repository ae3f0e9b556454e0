"""Figures in README, results and model cards agree with the files of results, and averages with their samples."""

import json
import re
from collections import defaultdict
from statistics import fmean

import pytest

from rtpurbo.models.artifact_config import ArtifactConfig
from tests.docs.figures import (
    EXPECTED,
    GIB,
    MIB,
    PUBLIC,
    RESULTS,
    ROOT,
    average_of,
    cells,
    is_rounded,
    marked_tables,
    printed,
    read,
    wrong_cells,
)

PAGES = ("README.md", "docs/results.md")
TABLES = [
    (page, table)
    for page in (
        *PAGES,
        "docs/how-to/memory.md",
        "docs/how-to/serve-expect.md",
        "recipes/smollm2-64k/README.md",
    )
    for table in marked_tables((ROOT / page).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "table"), TABLES, ids=lambda one: getattr(one, "name", one))
def test_tables_agree_with_their_files(page, table):
    assert not list(wrong_cells(table, EXPECTED[table.name]()))


def test_every_expected_table_is_on_a_page():
    assert {table.name for _, table in TABLES} == set(EXPECTED)


def test_wrong_figures_are_found():
    [table] = [one for page, one in TABLES if one.name == "public_models"]
    table.rows[0][1], right = "59.4", table.rows[0][1]
    try:
        [sentence] = wrong_cells(table, EXPECTED["public_models"]())
    finally:
        table.rows[0][1] = right
    assert "59.4" in sentence


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_figures_has_a_marker(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    marked = sum(len(table.rows) for one, table in TABLES if one == page)
    with_figures = [
        line
        for line in text.splitlines()
        if line.startswith("|") and printed(" ".join(cells(line)[1:]))
    ]
    # Header rows name lengths, so that they count where they do.
    bodies = [
        line
        for line in with_figures
        if not re.match(r"\|.*(full attention|FlashAttention|policy|share of)", line)
    ]
    assert len(bodies) <= marked


def test_links_to_results_on_the_pages_lead_to_files():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(((?:\.\./)?benchmarks/results/[^)#]+)\)", text):
            assert (ROOT / target.removeprefix("../")).exists(), f"{page}: {target}"


def bytes_per_token(layers, kv_heads, head_dim, bytes_per_number=2):
    return layers * kv_heads * head_dim * 2 * bytes_per_number


def _milliseconds(file, **values):
    [record] = [
        one
        for one in read(file)["records"]
        if all(one[name] == value for name, value in values.items())
    ]
    return record["milliseconds"]


def _served(policy, batch):
    """Record of requests of 128K tokens in vLLM's engine."""
    [found] = [
        record
        for record in read("serve-h200.json")["records"]
        if (record["policy"], record["context_length"], record["concurrency"])
        == (policy, 2**17, batch)
    ]
    return found


def _losses(*lengths):
    """By public model, what full attention has more than the conversion: means by length, and tasks."""
    found = {}
    for model, name in PUBLIC.items():
        results = read(name)
        means = [-average_of(results, "rtpurbo", length)["difference"] for length in lengths]
        scores = {
            (one["task"], one["context_length"], one["policy"]): one["score"]
            for one in results["records"]
            if one["suite"] == "ruler" and one["context_length"] in lengths
        }
        tasks = [
            scores[(*place, "full")] - score
            for (*place, policy), score in scores.items()
            if policy == "rtpurbo"
        ]
        found[model.split("-")[2]] = means, tasks
    return found


def _kept_heads(*artifacts):
    """Full KV heads and all KV heads of shipped artifacts, one after the other."""
    maps = [ArtifactConfig.read(ROOT / "artifacts" / name).config.head_map for name in artifacts]
    return [
        number
        for one in maps
        for number in (
            one.num_full_key_value_heads,
            sum(map(one.num_kv_heads, one.converted_layers)),
        )
    ]


def _block_lists(tasks, *files):
    """Accuracy of block lists at a sixteenth and an eighth of the maximum, and what dense retrieval heads have more."""
    found = []
    for file in files:
        by_rule = {one["rule"]: one["right"] for one in read(file)["records"]}
        dense = by_rule["dense retrieval heads, in the answer too"]
        for share in ("1/16", "1/8"):
            lists = by_rule[f"row_peak {share}"]
            for task in tasks:
                length = min(len(lists[task]), len(dense[task]))
                of_lists, of_dense = (100 * fmean(one[task][:length]) for one in (lists, dense))
                found.append((of_lists, of_dense - of_lists))
    return found


def _one_average(file, length, policy="rtpurbo"):
    average = average_of(read(file), policy, length)
    return [-average["difference"], *(-one for one in reversed(average["difference_ci95"]))]


SPARSE_PREFILL = "sparse-prefill-8k-h100.json", "sparse-prefill-8k-of-32k-h100.json"
EASY, HARD = ("4 keys", "16 keys"), ("4 values", "variables")
CONTROLS = "quality-smollm2-64k-controls-h200.json"
DEFAULTS = "quality-smollm2-135m-defaults-h200.json"

# A page, a pattern with a group for each figure, and the values of the figures.
PROSE = [
    (
        "README.md", r"takes ([\d.]+) ms, compared with ([\d.]+) ms for the faster dense kernel; with 16 "
        r"sequences, ([\d.]+) ms compared with ([\d.]+) ms",
        lambda: [
            value
            for batch in (1, 16)
            for flash, cudnn, ours in [
                [
                    _milliseconds(
                        "model-qwen2.5-coder-1.5b-h200.json", phase="model-decode", batch_size=batch,
                        implementation=name,
                    )
                    for name in ("sdpa-flash", "sdpa-cudnn", "rtpurbo")
                ]
            ]
            for value in (ours, min(flash, cudnn))
        ],
    ),
    (
        "recipes/smollm2-64k/README.md",
        r"three trainings, (\d+) minutes in all: (\d+) and (\d+) on two H100, and (\d+) on one",
        lambda: [
            seconds / 60
            for found in [read("teacher-64k-h100.json")]
            for each in [[found["seconds"], found["further"]["seconds"], found["again"]["seconds"]]]
            for seconds in (sum(each), *each)
        ],
    ),
    (
        "README.md", r"of (\d+) combinations of task",
        lambda: sum(len(tasks) for _, tasks in _losses(4096, 8192, 16384, 32768).values()),
    ),
    (
        "docs/results.md", r"In the answer, (\d+) of (\d+) KV heads of the\n\[0.5B model\]\S+ and (\d+) of (\d+)",
        lambda: _kept_heads("qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"),
    ),
    (
        "docs/results.md", r"With more questions, `vt` loses ([\d.]+)\n\((\S+) to ([\d.]+), 120",
        lambda: _one_average("quality-qwen2.5-coder-0.5b-variables-h200.json", 16384),
    ),
    (
        "docs/results.md", r"UUIDs lose ([\d.]+) points at 16K \(([\d.]+) to ([\d.]+), 120",
        lambda: _one_average("quality-qwen2.5-coder-1.5b-uuids-h200.json", 16384),
    ),
    (
        "docs/results.md", r"and ([\d.]+) at 32K\n\(([\d.]+) to ([\d.]+), 80 questions",
        lambda: _one_average("quality-qwen2.5-coder-1.5b-uuids-h200.json", 32768),
    ),
    (
        "docs/results.md", r"\(Quest\) lose ([\d.]+) points",
        lambda: _one_average("quality-qwen2.5-coder-1.5b-controls-16k-h200.json", 16384, "quest")[0],
    ),
    (
        "docs/results.md", r"random heads that read everything lose (\d+) to (\d+) points",
        lambda: [_one_average(CONTROLS, length, "random-heads")[0] for length in (8192, 32768)],
    ),
    (
        "docs/results.md", r"full attention ([\d.]+), rtpurbo ([\d.]+) \(-([\d.]+) to \+([\d.]+)\)",
        lambda: [
            *(average_of(read(DEFAULTS), one, 8192)["score"] for one in ("full", "rtpurbo")),
            *(abs(one) for one in average_of(read(DEFAULTS), "rtpurbo", 8192)["difference_ci95"]),
        ],
    ),
    (
        "docs/results.md", r"four tasks drops by\n([\d.]+) and ([\d.]+) points",
        lambda: [
            fmean(lost for _, lost in _block_lists(EASY + HARD, SPARSE_PREFILL[0])[first : first + 4])
            for first in (0, 4)
        ],
    ),
    (
        "docs/results.md", r"are unaffected \((\d+) to (\d+) %\)",
        lambda: [
            select(right for right, _ in _block_lists(EASY, SPARSE_PREFILL[0])) for select in (min, max)
        ],
    ),
    (
        "docs/results.md", r"which lose (\d+) to (\d+) points each",
        lambda: [
            select(lost for _, lost in _block_lists(HARD, *SPARSE_PREFILL)) for select in (min, max)
        ],
    ),
    ("README.md", r"takes ([\d.]+) GiB in bfloat16", lambda: bytes_per_token(36, 8, 128) * 2**17 / GIB),
    (
        "README.md", r"\[([\d.]+) ms per token\]",
        lambda: _milliseconds("model-decode-h100.json", context_length=2**17, implementation="sdpa-cudnn"),
    ),
    (
        "README.md", r"\[([\d.]+) s to read the prompt\]",
        lambda: _milliseconds("model-prefill-h100.json", implementation="sdpa-cudnn") / 1000,
    ),
    (
        "docs/how-to/serve-expect.md",
        r"Cache\*\*: ([\d,]+) tokens fit where the dense model has ([\d,]+) \(([\d.]+) times",
        lambda: [
            *(tokens := [_served(policy, 1)["cache_tokens"] for policy in ("rtpurbo", "full")]),
            tokens[0] / tokens[1],
        ],
    ),
    (
        "docs/how-to/serve-expect.md", r"decodes (\d+) tokens/s, the dense one (\d+) with six",
        lambda: [
            _served(policy, batch)["output_tokens_per_second"]
            for policy, batch in (("rtpurbo", 8), ("full", 6))
        ],
    ),
    (
        "README.md", r"decode ([\d.]+)x as fast at 128K, ([\d.]+)x with six requests",
        lambda: [
            _served("full", batch)["time_per_output_token_ms"]
            / _served("rtpurbo", batch)["time_per_output_token_ms"]
            for batch in (1, 6)
        ],
    ),
    (
        "docs/results.md", r"faster at 1M \((\d+) ms\)",
        lambda: _milliseconds(
            "prefill-h100.json", context_length=2**20, implementation="rtpurbo", density=0.1,
            sliding_window=8192,
        ),
    ),
    (
        "docs/results.md", r"^(\d+) measurements of one model",
        lambda: sum(len(read(f"ablations-8k-h100/{group}.json")["records"]) for group in "abcdef"),
    ),
    (
        "docs/results.md", r"window of 512; (\d+) of them train a stage 2",
        lambda: sum(
            any(name.startswith("stage2") for name in one["changes"])
            for group in "abcdef"
            for one in read(f"ablations-8k-h100/{group}.json")["records"]
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("page", "pattern", "value"), PROSE, ids=[one[1] for one in PROSE])
def test_figures_in_sentences_agree_with_their_files(page, pattern, value):
    [found] = re.finditer(pattern, (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    values = value()
    values = values if isinstance(values, list) else [values]
    for shown, expected in zip(found.groups(), values, strict=True):
        [(number, decimals)] = printed(shown)
        assert is_rounded(expected, number, decimals), (shown, expected)


def test_the_bounds_of_the_readme_hold():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [bounds] = re.findall(r"1\.5B model is within ([\d.]+) .* 0\.5B model within ([\d.]+);", text)
    losses = _losses(4096, 8192, 16384)
    for model, bound in zip(("1.5B", "0.5B"), bounds, strict=True):
        assert max(map(abs, losses[model][0])) <= float(bound)
    assert "loses more than five points" in text
    every = [loss for _, tasks in _losses(4096, 8192, 16384, 32768).values() for loss in tasks]
    assert max(every) <= 5 + 1e-9


CARDS = {
    "qwen2.5-coder-0.5b-instruct": "quality-qwen2.5-coder-0.5b-instruct.json",
    "qwen2.5-coder-1.5b-instruct": "quality-qwen2.5-coder-1.5b-instruct.json",
    "smollm2-135m-instruct": "quality-smollm2-135m-instruct.json",
    "smollm2-64k-sparse": "quality-smollm2-64k-h200.json",
}
MEANS = {
    "tokens read (mean)": "tokens_read_mean",
    "attention recall": "mass_kept",
    "attention recall (mean)": "mass_kept",
    "far tokens read (mean)": "far_tokens_read",
}


@pytest.mark.parametrize("artifact", CARDS)
def test_the_table_of_a_card_agrees_with_its_file(artifact):
    found = read(CARDS[artifact])
    text = (ROOT / "artifacts" / artifact / "README.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^## Evaluation\n(.*?)^## ", text, re.M | re.S)
    tables = re.findall(r"((?:^\|.*\n)+)", section, re.M)
    assert tables
    for table in tables:
        header, _, *rows = [cells(line) for line in table.splitlines()]
        checks = {"policy": _check_policies, "questions": _check_questions}
        checks.get(header[0], _check_length)(found, header, rows)


def _check_questions(found, header, rows):
    """A table of suites whose questions have their own length: a row for each suite, a column for each policy."""
    for name, *shown in rows:
        suite = name.split()[0].lower().replace("-", "_")
        for policy, cell in zip(header[1:], shown, strict=True):
            [record] = [
                one for one in found["records"] if (one["suite"], one["policy"]) == (suite, policy)
            ]
            assert name.endswith(f"({record['samples']})")
            assert _agrees(cell, [record["score"]]), (name, policy, cell)


def _check_length(found, header, rows):
    """A table of a suite and length: a row for each task, a column for each policy."""
    length = int(header[0].split()[-1].removesuffix("K")) * 1024
    suite = header[0].split()[0].lower()
    kept = {
        name: [one for one in found[name] if one["suite"] == suite]
        for name in ("records", "averages")
    }
    found = {**found, **kept}
    for name, *shown in rows:
        for policy, cell in zip(header[1:], shown, strict=True):
            records = [
                one for one in found["records"]
                if (one["policy"], one["context_length"]) == (policy, length)
            ]  # fmt: skip
            if cell == "-":
                assert (policy, length) == ("rtpurbo", 4096)  # everything lies in the window
                continue
            assert _agrees(cell, _value(found, records, name, policy, length)), (name, policy, cell)


def _value(found, records, name, policy, length):
    if name.startswith("mean of"):
        [average] = [
            one["score"] for one in found["averages"]
            if (one["policy"], one["context_length"]) == (policy, length)
        ]  # fmt: skip
        return [average]
    if name == "KV cache":
        return _sizes(found, records[0], length, policy)
    if name in MEANS:
        field = MEANS[name]
        if field == "far_tokens_read":
            return [100 * fmean(one[field] for one in records if one[field] is not None)]
        # Means over queries: tasks count by the queries that were measured.
        measured = sum(one["measured_rows"] for one in records)
        mean = sum(one[field] * one["measured_rows"] for one in records) / measured
        return [mean if field == "tokens_read_mean" else 100 * mean]
    [score] = [one["score"] for one in records if one["task"] == name]
    return [score]


def _sizes(found, record, length, policy):
    size = record["kv_bytes"]
    full = next(
        one["kv_bytes"] for one in found["records"]
        if (one["policy"], one["context_length"]) == ("full", length)
    )  # fmt: skip
    return [size] if policy == "full" else [size, size / full]


def _agrees(cell, values):
    scale = GIB if "GiB" in cell else MIB if "MiB" in cell else 1
    given = printed(cell)
    if scale != 1:
        values = [values[0] / scale, *values[1:]]
    return len(given) == len(values) and all(
        is_rounded(value, *one) for value, one in zip(values, given, strict=True)
    )


def _check_policies(found, header, rows):
    """A table with a row for each policy, and a column for each task and length."""
    for policy, *shown in rows:
        for column, cell in zip(header[1:], shown, strict=True):
            task, length = _task_and_length(column)
            [record] = [
                one for one in found["records"]
                if (one["policy"], one["task"], one["context_length"]) == (policy, task, length)
            ]  # fmt: skip
            if column.startswith("KV cache"):
                values = _sizes(found, record, length, policy)
            elif column.startswith("far tokens read"):
                values = [100 * record["far_tokens_read"]]
            else:
                values = [record["score"]]
            assert _agrees(cell, values), (policy, column, cell)


def _task_and_length(column):
    """The record that a column such as `single 2K` or `KV cache at 8K` is taken from."""
    words = column.replace("(", " ").replace(")", " ").replace(",", "").split()
    task = next((one for one in words if one in ("single", "multikey", "prose")), "prose")
    length = next(one for one in reversed(words) if re.fullmatch(r"\d+K?", one))
    return task, int(length.removesuffix("K")) * (1024 if length.endswith("K") else 1)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.samples.jsonl")), ids=lambda one: one.name)
def test_scores_and_averages_agree_with_their_samples(path):
    found = json.loads(path.with_name(path.name.replace(".samples.jsonl", ".json")).read_text())
    scores = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        place = (sample["suite"], sample["context_length"], sample["policy"])
        scores[place, sample["task"]].append(sample["score"])
    for record in found["records"]:
        place = (record["suite"], record["context_length"], record["policy"])
        taken = scores[place, record["task"]]
        assert len(taken) == record["samples"]
        assert fmean(taken) == pytest.approx(record["score"], abs=1e-9)
    for average in found["averages"]:
        place = (average["suite"], average["context_length"], average["policy"])
        tasks = {task: taken for (one, task), taken in scores.items() if one == place}
        assert (len(tasks), sum(map(len, tasks.values()))) == (average["tasks"], average["samples"])
        score = fmean(map(fmean, tasks.values()))
        assert score == pytest.approx(average["score"], abs=1e-9)
        if average["difference"] is not None:
            dense = [fmean(scores[(*place[:2], "full"), task]) for task in tasks]
            assert average["difference"] == pytest.approx(score - fmean(dense), abs=1e-9)
