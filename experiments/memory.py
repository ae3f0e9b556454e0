"""Measures the memory and the time of a conversion for models of known shapes with random weights.

`python experiments/memory.py qwen3-8b qwen3-14b qwen3-30b-a3b --output benchmarks/results/memory-h200.json`

Every shape has a process of its own. It runs the stages of a conversion with the settings of `--effort` (calibration,
stage 1, stage 2 with the refresh where the effort has them, and top-p by layer), each for two turns of its sequence
lengths. The first turn holds what happens once (compilation, initialization of the indexers, the first probe); minutes
are that turn, and the second one as often as the remaining steps need it. Weights are made on the device in the dtype
that they are run in, as a checkpoint would be loaded. The records of a stage are written when it ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rtpurbo.benchmarks.geometries import GEOMETRIES, build_model
from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.calibration.layer_top_p import find_layer_top_p
from rtpurbo.config import RTPurboConfig
from rtpurbo.conversion.assembly import stage2_kind
from rtpurbo.conversion.defaults import default_settings
from rtpurbo.data.tasks import TASKS
from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.files import write_json_atomically
from rtpurbo.models.sparsify import sparsify
from rtpurbo.models.stage2_weights import apply_stage2
from rtpurbo.settings import ConversionSettings, change_settings
from rtpurbo.training.stage1 import train_indexers
from rtpurbo.training.stage2 import distill
from rtpurbo.version import library_commit

GIB = 2**30
CONTEXT = 40960  # Qwen3's, without YaRN
TINY = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=[*GEOMETRIES, "tiny"], metavar="SHAPE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--effort", default="standard", choices=["standard", "thorough"])
    parser.add_argument("--length", type=int, default=32768, help="longest training sequence")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        [shape] = arguments.shapes
        measure(shape, arguments)
        return
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            options = [f"--{name}={getattr(arguments, name)}" for name in
                       ("effort", "length", "context", "device", "dtype")]  # fmt: skip
            command = [sys.executable, __file__, shape, "--worker", f"--output={part}", *options]
            if subprocess.run(command, check=False).returncode:
                print(f"{shape} failed", file=sys.stderr)
                failed.append(shape)
            if part.is_file():  # the stages before a failure
                records += json.loads(part.read_text(encoding="utf-8"))
        write_json_atomically(
            arguments.output,
            {
                "device": device_name(resolve_device(arguments.device)),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **{name: version(name) for name in ("torch", "transformers", "peft")},
                "commit": library_commit(),
                "command": shlex.join(["python", "experiments/memory.py", *sys.argv[1:]]),
                "records": records,
            },
        )
    print(table(records))
    if failed:
        sys.exit(1)


def settings_without_answers(effort: str, context: int, length: int) -> ConversionSettings:
    """Settings of an effort without the sequences that a model writes: these weights are random."""
    settings = default_settings(effort, context, max_length=length)
    drawn = {
        name: {task: share for task, share in stage.mixture.items() if TASKS[task].draw}
        for name, stage in (("stage1", settings.stage1), ("stage2", settings.stage2))
    }
    return change_settings(
        settings, {f"{name}.mixture": mixture for name, mixture in drawn.items()}
    )


def make_tokenizer(corpus: TextCorpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of part of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096), special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=alphabet,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus.documents[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


class Meter:
    """Peak memory of a stage, and the moments at which its steps were done.

    Args:
        shape: name of the model's shape.
        device: device of the model.
        output: file that gets the records after every stage; None for none.
        facts: further fields of the records.
    """

    def __init__(
        self, shape: str, device: torch.device, output: Path | None = None, **facts: Any
    ) -> None:
        self.shape, self.device = shape, device
        self.output, self.facts = output, facts
        self.records: list[dict[str, Any]] = []
        self._times: list[tuple[str, float]] = []

    def start(self) -> None:
        """Begins a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._times = [("", time.perf_counter())]

    def step(self, stage: str, done: int, total: int, figures: Any) -> None:
        """Notes that a step is done: the progress callback of the stages."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._times.append((stage, time.perf_counter()))

    def finish(self, stage: str, turn: int, steps: int, lengths: tuple[int, ...]) -> None:
        """Adds the record of a stage.

        Args:
            stage: its name.
            turn: steps in which every length comes equally often; two turns were measured.
            steps: of a whole conversion.
            lengths: of its sequences.
        """
        seconds, per_step = 0.0, []
        for name in dict.fromkeys(name for name, _ in self._times[1:]):
            moments = [(place, at) for place, (each, at) in enumerate(self._times) if each == name]
            ends = [self._times[moments[0][0] - 1][1], *(at for _, at in moments)]
            if len(moments) < 2 * turn:  # not a step: the same in a whole conversion
                seconds += ends[-1] - ends[0]
                continue
            first, second = ends[turn] - ends[0], ends[2 * turn] - ends[turn]
            once = max(0.0, first - second)
            seconds += once + second * steps / turn
            per_step.append(second / turn)
        on_gpu = self.device.type == "cuda"
        self.records.append(
            {
                "shape": self.shape,
                "stage": stage,
                "lengths": lengths,
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
                "seconds_per_step": sum(per_step),
                "steps": steps,
                "minutes": seconds / 60,
                "measured_seconds": time.perf_counter() - self._times[0][1],
                **self.facts,
            }
        )
        if self.output is not None:
            write_json_atomically(self.output, self.records)
        print(self.records[-1], flush=True)


def measure(shape: str, arguments: argparse.Namespace) -> None:
    """Measures one shape, and writes its records."""
    begin = time.perf_counter()
    GEOMETRIES["tiny"] = ("qwen3", TINY)
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    settings = settings_without_answers(arguments.effort, arguments.context, arguments.length)
    corpus, held_out = load_texts(None, "train"), load_texts(None, "heldout")
    tokenizer = make_tokenizer(corpus, GEOMETRIES[shape][1]["vocab_size"])
    model = build_model(shape, None, dtype, device, arguments.context)
    meter = Meter(
        shape,
        device,
        arguments.output,
        parameters=model.num_parameters(),
        weights_gib=sum(weight.nbytes for weight in model.parameters()) / GIB,
    )
    print(f"{shape}: text and model made in {time.perf_counter() - begin:.0f} s", flush=True)

    meter.start()
    documents = replace(settings.calibration, num_documents=2)
    found = calibrate(
        model, tokenizer, corpus, documents, rule=settings.attention, progress=meter.step
    )
    meter.finish("calibrate", 1, settings.calibration.num_documents, (documents.length,))
    sparsify(model, RTPurboConfig(found.head_map, settings.attention, settings.indexer))

    def indexers(stage: str, steps: int, on_student: bool) -> None:
        turn = settings.stage1.steps_per_sequence * len(settings.stage1.lengths)
        # Its last step ends with a probe, as every fiftieth step of a conversion does.
        shorter = replace(settings.stage1, steps=2 * turn, sequences_per_step=1)
        meter.start()
        train_indexers(
            model, tokenizer, corpus, held_out, shorter, stage=stage, on_student=on_student,
            progress=meter.step,
        )  # fmt: skip
        meter.finish(stage, turn, steps, shorter.lengths)

    indexers("stage1", settings.stage1.steps, False)
    if settings.stage2.steps:
        turn = len(settings.stage2.lengths)
        shorter_stage2 = replace(settings.stage2, steps=2 * turn, sequences_per_step=1)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            meter.start()
            distill(
                model, tokenizer, corpus, held_out, work / "stage2", shorter_stage2,
                teacher_folder=work / "teacher", progress=meter.step,
            )  # fmt: skip
            meter.finish("stage2", turn, settings.stage2.steps, shorter_stage2.lengths)
            apply_stage2(model, work / "stage2", stage2_kind(work))
        indexers("refresh", settings.stage2.refresh_steps, True)

    meter.start()
    sequences = replace(settings.calibration, top_p_sequences=2)
    find_layer_top_p(model, tokenizer, corpus, sequences, progress=meter.step)
    meter.finish("top-p", 1, settings.calibration.top_p_sequences, (sequences.length,))


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: peak memory of each stage, and the minutes of all of them."""
    stages = list(dict.fromkeys(record["stage"] for record in records))
    lines = [
        f"| shape | weights | {' | '.join(stages)} | minutes |",
        "|---|---:|" + "---:|" * (len(stages) + 1),
    ]
    for shape in dict.fromkeys(record["shape"] for record in records):
        of_shape = {record["stage"]: record for record in records if record["shape"] == shape}
        peaks = [of_shape.get(stage, {}).get("peak_allocated_gib") for stage in stages]
        cells = ["-" if peak is None else f"{peak:.1f}" for peak in peaks]
        minutes = f"{sum(record['minutes'] for record in of_shape.values()):.1f}"
        if len(of_shape) < len(stages):  # a stage failed
            minutes = "-"
        weights = statistics.fmean(record["weights_gib"] for record in of_shape.values())
        lines.append(f"| {shape} | {weights:.1f} | {' | '.join(cells)} | {minutes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
