import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_bytes, short_length
from rtpurbo.reporting.tables import markdown_tables, results_tables

RECORDS = [
    Record("needle", "single", 4096, "rtpurbo", 20, 80.0, 0.02, 512 * 1024),
    Record("perplexity", "prose", 2048, "rtpurbo", 20, 28.2, 0.05, 256 * 1024),
    Record("needle", "single", 4096, "local-only", 20, 0.0, 0.0, 1024),
    Record("needle", "single", 4096, "full", 20, 90.0, 1.0, 2 * 1024**2),
    Record("perplexity", "prose", 2048, "full", 20, 27.9, 1.0, 1024**2),
    Record("needle", "single", 4096, "something-new", 20, 89.0),
]


def printed(*renderables, **options):
    console = Console(file=io.StringIO(), width=140, **options)
    console.print(*renderables)
    return console.file.getvalue()


def test_markdown_has_the_dense_model_first_and_missing_values_as_dashes():
    assert markdown_tables(RECORDS).splitlines() == [
        "| test | full | rtpurbo | local-only | something-new |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| single 4K | 90 % | 80 % | 0 % | 89 % |",
        "| prose 2K | 27.90 | 28.20 | - | - |",
        "| far tokens read (prose 2K) | 100.0 % | 5.0 % | - | - |",
        "| KV cache at 4K | 2.0 MiB | 512.0 KiB (0.25x) | 1.0 KiB (0.00x) | - |",
    ]


def test_tables_of_the_terminal_fit_80_columns():
    policies = ["full", *(f"policy-{number:02}" for number in range(11))]
    records = [
        Record("needle", "multikey", length, policy, 20, 100.0, 0.5, 10 * 1024**2)
        for policy in policies
        for length in (2048, 4096)
    ]
    tables = results_tables(records)
    assert [[column.header for column in table.columns][1:3] for table in tables] == [
        ["full", "policy-00"],
        ["full", "policy-04"],
        ["full", "policy-08"],
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(*tables)
    assert "…" not in console.file.getvalue()
    assert all(name in console.file.getvalue() for name in policies)
    [alone] = results_tables([record for record in records if record.policy == "full"])
    assert [column.header for column in alone.columns] == ["test", "full"]


def test_losses_are_highlighted_in_the_terminal():
    text = printed(*results_tables(RECORDS), force_terminal=True, color_system="standard")
    red, yellow = re.escape("\x1b[1;31m") + " *", re.escape("\x1b[33m") + " *"
    assert re.search(f"{yellow}80 %", text)  # 16 of 20, not 18: may be chance
    assert re.search(f"{yellow}28.20", text)
    assert re.search(f"{red}0 %", text)
    assert len(re.findall(f"{red}|{yellow}", text)) == 3  # neither full nor something-new


def test_tables_without_the_dense_model_and_without_records():
    lone = markdown_tables([record for record in RECORDS if record.policy == "rtpurbo"])
    assert [line.split(" | ")[1] for line in lone.splitlines()[2:]] == [
        "80 % |", "28.20 |", "5.0 % |", "512.0 KiB |",
    ]  # fmt: skip
    assert results_tables([]) == []


def test_per_query_figures_have_rows():
    measured = {"tokens_read_mean": 1234.5, "mass_kept": 0.987, "measured_rows": 10}
    records = [replace(RECORDS[1], **measured), replace(RECORDS[4], metric="a"), RECORDS[0]]
    assert markdown_tables(records).splitlines() == [
        "| test | full | rtpurbo |",
        "| --- | ---: | ---: |",
        "| prose 2K | - | 28.20 |",
        "| prose a 2K | 27.90 | - |",
        "| single 4K | - | 80 % |",
        "| far tokens read (prose 2K) | - | 5.0 % |",
        "| tokens read (prose 2K) | - | 1,234 |",
        "| attention recall (prose 2K) | - | 98.7 % |",
        "| KV cache at 4K | - | 512.0 KiB |",
    ]

    ruler = [
        Record("ruler", task, 4096, "rtpurbo", 5, 9.0, 0.1, 9, None, tokens, 1, 1, mass, rows)
        for task, tokens, mass, rows in (("vt", 100.0, 0.9, 10), ("cwe", 400.0, 0.6, 20))
    ]
    ruler.append(Record("ruler", "fwe", 4096, "rtpurbo", 5, 9.0))
    lines = markdown_tables(ruler).splitlines()
    assert lines[-3:-1] == ["| tokens read (mean) | 300 |", "| attention recall (mean) | 70.0 % |"]


def test_differences_of_means_to_the_dense_model():
    records = [
        Record("ruler", task, 4096, policy, 25, 80.0)
        for task in ("vt", "cwe")
        for policy in ("full", "rtpurbo", "quest", "local-only")
    ]
    averages = [
        Average("ruler", 4096, "full", 2, 50, 80.0, (75.0, 85.0)),
        Average("ruler", 4096, "rtpurbo", 2, 50, 79.5, (74.0, 84.0), -0.5, (-2.0, 1.0)),
        Average("ruler", 4096, "quest", 2, 50, 70.0, (64.0, 75.0), -10.0, (-12.0, -8.0)),
        # Of more tasks than the table shows.
        Average("ruler", 4096, "local-only", 3, 75, 20.0, (14.0, 24.0), -60.0, (-62.0, -50.0)),
    ]
    lines = markdown_tables(records, averages=averages).splitlines()
    assert lines[0] == "| RULER 4K | full | rtpurbo | quest | local-only |"
    assert lines[5:7] == [
        "| minus full (95 %, in pairs) | - | -0.5 (-2.0 to +1.0) | -10.0 (-12.0 to -8.0) | - |",
        "| far tokens read (mean) | - | - | - | - |",
    ]
    assert "minus full" not in markdown_tables(records)
    tables = results_tables(records, averages=averages)
    text = printed(*tables, force_terminal=True, color_system="standard")
    assert re.search(re.escape("\x1b[1;31m") + " *-10.0", text)
    assert not re.search(r"\x1b\[\d[\d;]*m *-0.5 \(", text)


def test_ruler_has_a_table_for_each_length_with_tasks_as_rows():
    scores = {"vt": (100.0, 90.0), "niah_single_1": (100.0, 99.0), "cwe": (50.0, None)}
    records = [
        Record("ruler", task, 4096, policy, 25, score, 0.5, size * 1024)
        for task, pair in scores.items()
        for policy, score, size in zip(("full", "rtpurbo"), pair, (4, 1), strict=True)
        if score is not None
    ]
    # Tests that are taken side by side end in any order.
    whole = [*RECORDS, Record("ruler", "vt", 8192, "full", 25, 80.0), *records]
    few, four, eight = markdown_tables(whole).split("\n\n")
    assert few == markdown_tables(RECORDS)
    assert four.splitlines() == [
        "| RULER 4K | full | rtpurbo |",
        "| --- | ---: | ---: |",
        "| niah_single_1 | 100 % | 99 % |",
        "| vt | 100 % | 90 % |",
        "| cwe | 50 % | - |",
        "| mean of 3 | 83.3 % | - |",
        "| far tokens read (mean) | 50.0 % | 50.0 % |",
        "| KV cache | 4.0 KiB | 1.0 KiB (0.25x) |",
    ]
    assert eight.splitlines()[2:] == [
        "| vt | 80 % |",
        "| mean of 1 | 80.0 % |",
        "| far tokens read (mean) | - |",
        "| KV cache | - |",
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (short_length(0), "0"),
        (short_length(500), "500"),
        (short_length(1024), "1K"),
        (short_length(7500), "7,500"),
        (short_length(131072), "128K"),
        (short_length(2**21), "2M"),
        (short_bytes(0), "0 B"),
        (short_bytes(1023), "1023 B"),
        (short_bytes(1536), "1.5 KiB"),
        (short_bytes(5 * 1024**4), "5120.0 GiB"),
        (percent(0.1534), "15.3 %"),
    ],
)
def test_formats_of_numbers(written, expected):
    assert written == expected


def test_short_questions_have_a_table_of_suites_with_their_pairs():
    records = [
        Record("gsm8k", "all", 0, "rtpurbo", 500, 59.8),
        Record("gsm8k", "all", 0, "full", 500, 60.4),
        Record("mmlu_pro", "all", 0, "full", 560, 33.25),
    ]
    pair = Average("gsm8k", 0, "rtpurbo", 1, 500, 59.8, (55.0, 64.0), -0.6, (-2.4, 1.2))
    assert markdown_tables(records, averages=[pair]).splitlines() == [
        "| questions | full | rtpurbo |",
        "| --- | ---: | ---: |",
        "| GSM8K (500) | 60.4 % | 59.8 % |",
        "|   minus full (95 %, in pairs) | - | -0.6 (-2.4 to +1.2) |",
        "| MMLU-Pro (560) | 33.2 % | - |",
    ]


def test_babilong_has_a_table_for_each_length_after_those_of_ruler():
    records = [
        Record(suite, task, length, "full", 10, 50.0, kv_bytes=1024)
        for suite, task in (("babilong", "qa1"), ("babilong", "qa2"), ("ruler", "vt"))
        for length in (8192, 4096)
    ]
    titles = [table.columns[0].header for table in results_tables(records)]
    assert titles == ["RULER 4K", "RULER 8K", "BABILong 4K", "BABILong 8K"]
