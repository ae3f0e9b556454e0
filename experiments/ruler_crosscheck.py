"""Do RULER's tasks as we generate them score as those of LM Evaluation Harness do?

    python experiments/ruler_crosscheck.py ARTIFACT --length 1024 --length 2048 --samples 20 -o crosscheck.json

Five tasks that lm-eval (`pip install 'rtpurbo[lm-eval]'`) makes without a network are asked of one model
at the same lengths, in its prompts and in ours. Samples, words and wording differ, and so does what counts
towards the length (lm-eval leaves the chat template out); task, parameters and metric are the same. The
last column tells whether the 95 % interval of the difference, by bootstrap, holds zero.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from rtpurbo.devices import device_name, resolve_device
from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.evaluation.run import evaluate
from rtpurbo.evaluation.samples import SampleRecord

# Ours, and how lm-eval calls it.
PAIRS = {
    "niah_single_1": "niah_single_1",
    "niah_multikey_2": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_3",
    "vt": "ruler_vt",
    "fwe": "ruler_fwe",
}
RESAMPLES = 10_000


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the difference of two means of independent scores, by bootstrap."""
    rng = np.random.default_rng(seed)
    means = [
        scores[rng.integers(0, len(scores), (RESAMPLES, len(scores)))].mean(1)
        for scores in (np.asarray(ours), np.asarray(theirs))
    ]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def scores_by_test(samples: Sequence[SampleRecord]) -> dict[tuple[str, str, int], list[float]]:
    """The scores of every test: (suite, task, length)."""
    scores: dict[tuple[str, str, int], list[float]] = {}
    for item in samples:
        test = (item.suite, item.task, item.context_length)
        scores.setdefault(test, []).append(item.sample.score)
    return scores


def comparison(samples: Sequence[SampleRecord], lengths: Sequence[int]) -> str:
    """A table in Markdown: a row for each task and length."""
    scores = scores_by_test(samples)
    asked = {task for suite, task, _ in scores if suite == "ruler"}
    lines = [
        "| task | length | ours | lm-eval | difference | 95 % interval | agree |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for length in lengths:
        for name, other in PAIRS.items():
            if name not in asked:
                continue
            ours, theirs = scores["ruler", name, length], scores["lm-eval", other, length]
            low, high = difference_interval(ours, theirs)
            row = [
                name,
                f"{length:,}",
                f"{fmean(ours):.1f}",
                f"{fmean(theirs):.1f}",
                f"{fmean(ours) - fmean(theirs):+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                "yes" if low <= 0 <= high else "NO",
            ]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--length", type=int, action="append", required=True)
    parser.add_argument("--task", action="append", choices=PAIRS, help="left out: all five")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--policy", default="full", help="full asks the artifact's base model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", "-o", type=Path)
    options = parser.parse_args(arguments)
    pairs = {name: PAIRS[name] for name in options.task or PAIRS}

    samples: list[SampleRecord] = []
    lengths = ",".join(str(length) for length in options.length)
    records = evaluate(
        options.artifact,
        suites=[
            f"ruler:{','.join(pairs)}@{lengths}",
            f"lm-eval:{','.join(pairs.values())}@{lengths}",
        ],
        samples=options.samples,
        policies=[options.policy],
        device=options.device,
        keep_sample=samples.append,
    )
    print(comparison(samples, options.length))
    if options.output:
        command = shlex.join(["python", "experiments/ruler_crosscheck.py", *sys.argv[1:]])
        device = device_name(resolve_device(options.device))
        write_results(options.output, options.artifact, device, command, records)
    return records


if __name__ == "__main__":
    main()
