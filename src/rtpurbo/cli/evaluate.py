"""`rtpurbo eval`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from rtpurbo.cli import options
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly


def evaluate(
    artifact: options.Artifact,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="needle (questions about numbers hidden in prose), perplexity, ruler (its 13 "
            "tasks), gsm8k, math, mmlu_pro, humaneval and babilong (questions from files, see "
            "--task-data), lm-eval (any task of LM Evaluation Harness), or some tasks of them: "
            "needle:single,multikey,multivalue, ruler:niah_multikey_2,vt or lm-eval:aime24. With "
            "lengths of its own: ruler@4096,8192. Repeat it for several.",
            show_default="needle, perplexity",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        options.optional(
            metavar="TASK,TASK",
            help="Tasks of the one suite named, as in --suite lm-eval --tasks aime24,mmlu_pro_math.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Tokens of a test, within the model's context. Repeat it for several.",
            show_default="2048, 4096; of lm-eval: the model's context",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions or windows of each test.",
            show_default="10; of gsm8k, math, mmlu_pro, humaneval and lm-eval: all",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy to compare: full (the dense model), rtpurbo, rtpurbo-paper and "
            "rtpurbo-residual (two readings of top-p), rtpurbo-sparse-prefill (sparse in the prompt "
            "too), rtpurbo-float8-index, rtpurbo-before-stage2, the peers dense-heads, quest, top-k "
            "and oracle-top-p, the controls local-only (windows alone) and random-heads, or all. "
            "Repeat it for several.",
            show_default="full, rtpurbo",
        ),
    ] = None,
    data: options.Data = None,
    squad: Annotated[
        Path | None,
        options.optional(
            help="Questions of ruler:qa_1: a JSON file in SQuAD's format. Default: built-in ones."
        ),
    ] = None,
    hotpotqa: Annotated[
        Path | None,
        options.optional(
            help="Questions of ruler:qa_2: a JSON file in HotpotQA's distractor format. Default: "
            "built-in ones."
        ),
    ] = None,
    task_data: Annotated[
        list[str] | None,
        options.optional(
            metavar="NAME=PATH",
            help="Questions of gsm8k, math, mmlu_pro, humaneval or babilong: a .jsonl or .jsonl.gz "
            "file with the columns of the data on the Hub. Or those of a task of lm-eval: such a file, "
            "or a folder with a file for each split. Repeat it for several.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        options.optional(
            min=1,
            help="Maximum number of tokens of an answer to lm-eval, gsm8k, math, mmlu_pro and humaneval. "
            "Default: set by the task.",
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Allow humaneval to execute code that the model writes, in a limited process without "
            "network. The code is untrusted: docs/evaluation.md describes the sandbox.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the weights; auto is float32 on a CPU, bfloat16 on a GPU."),
    ] = "auto",
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of tests that run at the same time, each in its own process, on all GPUs. "
            "A small model leaves most of a GPU idle in decoding; memory limits the number.",
        ),
    ] = 1,
    output: Annotated[
        Path | None,
        options.optional(
            "--output",
            "-o",
            help="JSON file for the results, written at the end and when the run is stopped; every "
            "question with its answer goes to NAME.samples.jsonl in the same folder. Each finished result is "
            "appended to NAME.log.jsonl, which --resume reads.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep the results in the file of --output and run only the missing tests. Artifact, seed, "
            "samples, data, dtype and kind of device must be the same as before.",
        ),
    ] = False,
    force: options.Force = False,
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Write the results into the artifact's README.md.")
    ] = False,
    base_model: options.BaseModel = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Evaluate a sparse model and the dense one: quality, tokens read and cache size.

    Every policy gets the same tests, on text that conversion does not train on.
    Ctrl-C and SIGTERM end a run after the current question; `--resume` continues it.

    `rtpurbo eval smollm2-sparse --suite needle --length 4096 --samples 20`

    `rtpurbo eval smollm2-sparse --suite ruler@4096,8192 --samples 25 -o ruler.json`

    `rtpurbo eval smollm2-sparse --suite lm-eval --tasks aime24,mmlu_pro_math`
    """
    if resume and output is None:
        raise RTPurboError("--resume continues a file of results: name it with --output.")

    from rtpurbo.evaluation import request
    from rtpurbo.evaluation.cases import DEFAULT_SUITES
    from rtpurbo.evaluation.paths import log_path, samples_path

    for path in () if output is None or resume or force else (output, log_path(output)):
        if path.exists():
            raise RTPurboError(
                f"{path} exists: pass --resume to continue it, or --force to replace it."
            )
    suites = options.suites_with_tasks(suite or DEFAULT_SUITES, tasks, length)
    lengths = length or request.DEFAULT_LENGTHS
    policies = policy or request.DEFAULT_POLICIES
    files = options.assignments("--task-data", task_data)
    # Errors are reported before torch is imported, which takes seconds.
    request.Request.of(
        suites,
        lengths,
        policies,
        samples=samples,
        task_data=files,
        seed=seed,
        run_code=run_code,
    ).check_lengths(artifact, base_model)

    import torch
    from rich.console import Console

    from rtpurbo.cli.progress import ProgressBars
    from rtpurbo.devices import device_name, resolve_device
    from rtpurbo.evaluation import run
    from rtpurbo.evaluation.results_log import ResultsLog
    from rtpurbo.models.artifact_config import find_artifact
    from rtpurbo.reporting.tables import results_tables, rewrite_card

    place = resolve_device(device)
    command = shlex.join(["rtpurbo", *sys.argv[1:]])
    results = ResultsLog(output, artifact, device_name(place), command, resume=resume)
    with _stopping_cleanly(output), results, ProgressBars() as progress:
        records = run.evaluate(
            artifact,
            suites=suites,
            lengths=lengths,
            samples=samples,
            policies=policies,
            data=data or None,
            base_model=base_model,
            seed=seed,
            device=place,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            squad=squad,
            hotpotqa=hotpotqa,
            task_data=files,
            max_new_tokens=max_new_tokens,
            run_code=run_code,
            processes=processes,
            results=results,
            progress=progress,
        )
    Console().print(*results_tables(records, averages=results.averages))
    if output is not None:
        typer.echo(f"Written to {output}.")
        if results.samples:
            typer.echo(f"Every question is in {samples_path(output)}.")
    if write_card:
        rewrite_card(find_artifact(artifact), records)


@contextmanager
def _stopping_cleanly(output: Path | None) -> Iterator[None]:
    """`stopping_cleanly` with advice where there is no file to resume."""
    try:
        with stopping_cleanly():
            yield
    except StoppedBySignalError as stopped:
        if output is not None:
            raise
        advice = "what was measured is lost; name a file with --output to keep it the next time."
        raise StoppedBySignalError(stopped.number, advice=advice) from None
