"""Made-up results in the form of real ones."""

from __future__ import annotations

import json
from pathlib import Path

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.speed_records import SpeedRecord, SpeedResults, write_speed

# Score, tokens read of a context, attention recall.
POLICIES = {
    "full": (98.0, 1.0, 1.0),
    "rtpurbo": (97.5, 0.1, 0.98),
    "quest": (91.0, 0.1, 0.9),
    "local-only": (10.0, 0.05, 0.6),
}
LENGTHS = (4096, 8192)


def ruler_records() -> list[Record]:
    """Two tasks, two lengths, four policies, with everything that format 2 has."""
    return [
        Record(
            "ruler",
            task,
            length,
            policy,
            25,
            score,
            far_tokens_read={"full": 1.0, "local-only": 0.0}.get(policy, 0.05),
            kv_bytes=int(length * share * 1024),
            ci95=(score - 2, min(score + 2, 100)),
            tokens_read_mean=length * share,
            tokens_read_p50=length * share * 0.8,
            tokens_read_p95=length * share * 2,
            mass_kept=mass,
            measured_rows=100,
            far_tokens_histogram=(10, 0, 30, 60) if policy in ("rtpurbo", "quest") else (100,),
        )
        for length in LENGTHS
        for policy, (score, share, mass) in POLICIES.items()
        for task in list(TASKS)[:2]
    ]


def ruler_averages() -> list[Average]:
    """Their means, with intervals of the differences."""
    dense = POLICIES["full"][0]
    return [
        Average("ruler", length, policy, 2, 50, score, (score - 2, score + 2), *difference)
        for length in LENGTHS
        for policy, (score, *_) in POLICIES.items()
        for difference in [
            () if policy == "full" else (score - dense, (score - dense - 1.5, score - dense + 1.0))
        ]
    ]


def old_records() -> list[Record]:
    """Records of format 1."""
    return [
        Record("needle", "single", 2048, "full", 20, 100.0, 1.0, 4096),
        Record("needle", "single", 2048, "rtpurbo", 20, 95.0, 0.1, 1024),
        Record("perplexity", "prose", 2048, "full", 20, 35.0, 1.0, 4096),
        Record("perplexity", "prose", 2048, "rtpurbo", 20, 35.7, 0.2, 1024),
    ]


def speed_records() -> list[SpeedRecord]:
    """A decode step at two lengths, and one of a batch."""
    shape = {
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_retrieval_heads": 5,
        "head_dim": 128,
        "sliding_window": 8192,
        "peak_memory_bytes": 2**30,
    }
    return [
        SpeedRecord(
            phase="decode",
            context_length=length,
            batch_size=batch,
            density=1.0 if name == "sdpa-flash" else 0.03,
            implementation=name,
            milliseconds=time,
            milliseconds_p10=time,
            milliseconds_p90=time,
            **shape,
        )
        for length, batch, flash, ours in (
            (32768, 1, 0.03, 0.04),
            (131072, 1, 0.1, 0.04),
            (131072, 8, 0.8, 0.2),
        )
        for name, time in (("sdpa-flash", flash), ("rtpurbo", ours))
    ]


def write_examples(folder: Path) -> dict[str, Path]:
    """Files of results: quality of both formats, and speed."""
    paths = {name: folder / f"{name}.json" for name in ("quality", "old", "speed")}
    write_results(
        paths["quality"],
        "some/model",
        "cpu",
        "rtpurbo eval",
        ruler_records(),
        averages=ruler_averages(),
    )
    write_results(paths["old"], "some/model", "cpu", "rtpurbo eval", old_records())
    old = json.loads(paths["old"].read_text())
    kept = ("suite", "task", "context_length", "policy", "samples", "score", "far_tokens_read")
    old["format_version"] = 1
    old["records"] = [{name: row[name] for name in (*kept, "kv_bytes")} for row in old["records"]]
    paths["old"].write_text(json.dumps(old))
    results = SpeedResults(speed_records(), notes=["a <note>"])
    write_speed(paths["speed"], "a GPU", "rtpurbo bench decode", results)
    return paths
