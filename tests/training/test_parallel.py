"""Two processes against one: the same losses, with whole weights and divided ones, and after a change of number."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from rtpurbo.config import AttentionRule, IndexerSettings
from rtpurbo.conversion import convert
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.processes import Processes, check_parallelism
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
    StreamSettings,
)
from rtpurbo.training.source import check_shares
from tests.two_processes import run_in_two_processes

SETTINGS = ConversionSettings(
    attention=AttentionRule(sliding_window=64, min_tokens=8, block_size=16),
    indexer=IndexerSettings(index_dim=4),
    calibration=CalibrationSettings(length=384, num_documents=1, count=3),
    stage1=IndexerTrainingSettings(
        steps=20, lengths=(420, 500), steps_per_sequence=3, queries_per_step=32, warmup_steps=2,
        init_sequences=1, probe_sequences=1, probe_every=10, sequences_per_step=2,
    ),
    stage2=DistillationSettings(
        steps=20, lengths=(420, 500), targets_per_sequence=64, warmup_steps=1, lora_rank=2,
        refresh_steps=3, checkpoint_every=6, sequences_per_step=2,
    ),
)  # fmt: skip
FULL_WEIGHTS = replace(
    SETTINGS,
    stage1=replace(SETTINGS.stage1, steps=4),
    stage2=replace(SETTINGS.stage2, steps=20, lora_rank=0, refresh_steps=0),
)
STREAMED = replace(
    FULL_WEIGHTS,
    stream=StreamSettings(enabled=True, buffer_size=8, held_out=4),
    stage1=replace(SETTINGS.stage1, steps=20),
    stage2=replace(SETTINGS.stage2, steps=6, refresh_steps=0),
)
LAYERWISE = replace(
    SETTINGS,
    stage1=replace(SETTINGS.stage1, steps_per_sequence=1, sequences_per_step=4),
    stage2=replace(SETTINGS.stage2, steps=0),
)
# Heads by gates, and sequences that the model writes before it is trained.
WRITTEN = replace(
    SETTINGS,
    calibration=CalibrationSettings(
        ranking="gates", length=500, num_documents=10, granularity="kv_group", ratio=0.42,
        top_p_sequences=2,
    ),
    stage1=replace(SETTINGS.stage1, steps=4, mixture={"needles": 0.5, "documents": 0.5}),
    stage2=replace(
        SETTINGS.stage2, steps=6, lora_scale=None,
        mixture={"needles": 0.2, "documents": 0.3, "conversations": 0.4},
    ),
)  # fmt: skip
# As many sequences a step as there are processes when it begins.
LEFT_OPEN = replace(
    SETTINGS,
    stage1=replace(SETTINGS.stage1, sequences_per_step=None),
    stage2=replace(SETTINGS.stage2, sequences_per_step=None),
)
DIVERGING = replace(SETTINGS, stage1=replace(SETTINGS.stage1, learning_rate=1e30))
JOBS = {
    "lora": SETTINGS,
    "left_open": LEFT_OPEN,
    "full": FULL_WEIGHTS,
    "streamed": STREAMED,
    "layerwise": LAYERWISE,
    "written": WRITTEN,
    "diverging": DIVERGING,
}

# Arguments: base, text, and jobs as OUTPUT,SETTINGS,PARALLELISM or OUTPUT,SETTINGS,PARALLELISM,STAGE,STEP.
_WORKER = """
import os, signal, sys
from rtpurbo.conversion import convert
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from tests.training.test_parallel import JOBS

base, text, *jobs = sys.argv[1:]
for job in jobs:
    output, settings, parallel, *stop = job.split(",")
    def progress(stage, done, total, figures):
        # Progress is reported on the main process only, and only it gets the signal.
        if stop == [stage, str(done)]:
            os.kill(os.getpid(), signal.SIGTERM)
    data = [text] if settings == "streamed" else None
    try:
        with stopping_cleanly():
            convert(base, output, settings=JOBS[settings], data=data, device="cpu",
                    parallel=parallel, progress=progress, resume=True)
    except StoppedBySignalError as error:
        assert stop and error.exit_code == 143, error
        print(error)
    except RTPurboError as error:
        assert settings == "diverging", error
        print(error)
    else:
        assert not stop and settings != "diverging"
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [f"Document {n} tells of number {n * n}. " * (20 + 7 * (n % 5)) for n in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def in_two_processes(base, text, *jobs):
    return run_in_two_processes(_WORKER, text.parent, base, text, *jobs)


def entries_of(artifact):
    return [json.loads(line) for line in (artifact / "training_log.jsonl").read_text().splitlines()]


def assert_same_curves(actual, expected):
    """Every figure of every step to 1e-5, relative."""
    actual, expected = entries_of(actual), entries_of(expected)
    assert [(entry["stage"], entry["step"]) for entry in actual] == [
        (entry["stage"], entry["step"]) for entry in expected
    ]
    for one, other in zip(actual, expected, strict=True):
        figures = [{key: entry[key] for key in entry if key != "stage"} for entry in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_two_processes_train_as_one(tiny_base, tmp_path, text):
    alone = convert(str(tiny_base), tmp_path / "alone", settings=SETTINGS, device="cpu")
    in_two_processes(
        tiny_base, text, f"{tmp_path / 'data'},lora,data", f"{tmp_path / 'fsdp'},lora,fsdp"
    )
    for name in ("data", "fsdp"):
        assert_same_curves(tmp_path / name, alone)
        assert ArtifactConfig.read(tmp_path / name).settings == ArtifactConfig.read(alone).settings
        load(tmp_path / name)


_STAGES = """
import sys
from pathlib import Path
from rtpurbo.conversion.job import Job
from rtpurbo.models.base import load_base_model
from rtpurbo.models.sharding import is_sharded, own_part
from rtpurbo.models.sparsify import sparsify
from tests.training.test_parallel import SETTINGS

def held(stage, done, total, figures):
    layers = base.model.base_model.layers
    base_weights = [(own_part(weight), weight) for name, weight in layers.named_parameters()
                    if "indexer" not in name and "lora" not in name]
    # FSDP gathers a layer's weights while it runs, and no layer runs now.
    share = sum(part.nbytes for part, _ in base_weights) / sum(w.nbytes for _, w in base_weights)
    assert is_sharded(base.model) and 0.49 < share < 0.51, (stage, share)
    seen.add(stage)

seen = set()
with Job(Path(sys.argv[2]), device="cpu", progress=held, parallel="fsdp", dtype=sys.argv[3]) as job:
    job.progress = held  # on both processes
    base = job.open(
        lambda job: load_base_model(sys.argv[1], dtype=job.dtype, processes=job.processes),
        SETTINGS, "convert",
    )
    sparsify(base.model, job.calibrate(base))
    job.stage1(base)
    job.stage2(base)
    job.finish(base)
assert seen == {"calibrate", "stage1", "teacher", "stage2", "refresh"}, seen
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_each_process_holds_half_of_the_layers_in_every_stage(dtype, tiny_base, tmp_path):
    run_in_two_processes(_STAGES, tmp_path, tiny_base, tmp_path / "fsdp", dtype)
    alone = convert(
        str(tiny_base), tmp_path / "alone", settings=SETTINGS, device="cpu", dtype=dtype
    )
    if dtype == "float32":
        assert_same_curves(tmp_path / "fsdp", alone)
    else:
        # Sums in another order, rounded to 8 bits.
        last, expected = (entries_of(folder)[-1]["loss"] for folder in (tmp_path / "fsdp", alone))
        assert last == pytest.approx(expected, rel=0.05)
    assert ArtifactConfig.read(tmp_path / "fsdp").base == ArtifactConfig.read(alone).base


_TEACHER = """
import sys
from pathlib import Path
import torch
from rtpurbo.data.texts import load_texts
from rtpurbo.models.base import load_base_model
from rtpurbo.processes import init_distributed
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.source import SequenceSource
from rtpurbo.training.teacher import TeacherCache
from tests.training.test_parallel import SETTINGS

processes = init_distributed(torch.device("cpu"), "fsdp")
whole, part = (load_base_model(sys.argv[1], **options) for options in ({}, {"processes": processes}))
corpus = load_texts(None)

def fill(base, folder, processes):
    mix = TrainingMix.of(SETTINGS.stage2, base.tokenizer, corpus, 0, "stage2")
    cache = TeacherCache(folder, SequenceSource(mix, corpus, 2, processes), SETTINGS.stage2, 0)
    cache.fill(base.model, 0)
    return cache

class Alone(type(processes)):
    shard_weights = False

alone = Alone(processes.index, 2, processes.local_index, "data")
expected = fill(whole, Path(sys.argv[2], f"expected-{processes.index}"), alone)
shared = Path(sys.argv[2], "shared")
if processes.is_main:
    fill(whole, shared, alone)  # what an interrupted run has left
processes.wait()
found = fill(part, shared, processes)
sequence, targets = found.read(processes.index)
assert sequence == expected.read(processes.index)[0]
for name, value in vars(expected.read(processes.index)[1]).items():
    torch.testing.assert_close(getattr(targets, name), value)
"""


@pytest.mark.slow
def test_a_process_with_all_its_targets_helps_to_compute_the_others(tiny_base, tmp_path):
    """All processes run every layer of a sharded teacher, also where only one lacks its targets."""
    run_in_two_processes(_TEACHER, tmp_path, tiny_base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["full", "layerwise"])
def test_other_trainings_in_two_processes(settings, tiny_base, tmp_path, text):
    alone = convert(str(tiny_base), tmp_path / "alone", settings=JOBS[settings], device="cpu")
    in_two_processes(
        tiny_base, text, *(f"{tmp_path / name},{settings},{name}" for name in ("data", "fsdp"))
    )
    for name in ("data", "fsdp"):
        assert_same_curves(tmp_path / name, alone)
        load(tmp_path / name)


@pytest.mark.slow
def test_a_sharded_model_trains_gates_and_writes_sequences(tiny_base, tmp_path, text):
    """Samples differ with the number of processes; heads and the number of sequences do not."""
    options = {"settings": WRITTEN, "device": "cpu"}
    alone = convert(str(tiny_base), tmp_path / "alone", **options)
    in_two_processes(tiny_base, text, f"{tmp_path / 'fsdp'},written,fsdp")
    configs = [ArtifactConfig.read(folder).config for folder in (alone, tmp_path / "fsdp")]
    maps = [config.head_map for config in configs]
    assert maps[0].retrieval_heads == maps[1].retrieval_heads
    for one, other in zip(maps[0].scores, maps[1].scores, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    steps = [
        [(entry["stage"], entry["step"]) for entry in entries_of(folder)]
        for folder in (alone, tmp_path / "fsdp")
    ]
    assert steps[0] == steps[1]
    load(tmp_path / "fsdp")


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tiny_base, tmp_path, text):
    for settings in ("lora", "full"):
        convert(str(tiny_base), tmp_path / settings, settings=JOBS[settings], device="cpu")

    def interrupt(stage, done, total, figures):
        if (stage, done) == ("stage2", 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            str(tiny_base),
            tmp_path / "one",
            settings=FULL_WEIGHTS,
            device="cpu",
            progress=interrupt,
        )
    said = in_two_processes(
        tiny_base,
        text,
        f"{tmp_path / 'data'},left_open,data,stage1,7",
        f"{tmp_path / 'fsdp'},full,fsdp,stage2,9",
        f"{tmp_path / 'one'},full,fsdp",
    )
    assert "stopped by SIGTERM after step 8 of stage1" in said
    for name, settings, expected in (("data", "left_open", "lora"), ("fsdp", "full", "full")):
        output = tmp_path / name
        assert not output.exists()
        convert(str(tiny_base), output, settings=JOBS[settings], device="cpu", resume=True)
        assert_same_curves(output, tmp_path / expected)
    assert_same_curves(tmp_path / "one", tmp_path / "full")


@pytest.mark.slow
def test_both_processes_name_the_batch_that_was_not_finite(tiny_base, tmp_path, text):
    said = in_two_processes(tiny_base, text, f"{tmp_path / 'out'},diverging,data")
    [path] = (tmp_path / "out.work").glob("stage1-step-*-not-finite.safetensors")
    assert said.count(f"is not finite; the batch is saved in {path}") == 2
    sequences = load_file(path)
    assert sequences
    assert all(len(ids) > 400 for ids in sequences.values())


@pytest.mark.slow
def test_a_stream_is_the_same_for_one_process_and_two_and_after_a_change(tiny_base, tmp_path, text):
    pytest.importorskip("datasets")
    common = {"settings": STREAMED, "data": [str(text)], "device": "cpu"}
    alone = convert(str(tiny_base), tmp_path / "alone", **common)
    in_two_processes(
        tiny_base,
        text,
        f"{tmp_path / 'two'},streamed,data",
        f"{tmp_path / 'changed'},streamed,data,stage1,10",
    )
    assert_same_curves(tmp_path / "two", alone)
    convert(str(tiny_base), tmp_path / "changed", resume=True, **common)
    assert_same_curves(tmp_path / "changed", alone)


def test_unsupported_parallelism_is_refused():
    with pytest.raises(RTPurboError, match="choose --parallel fsdp"):
        check_parallelism("tensor")
    with pytest.raises(RTPurboError, match="no parallelism 'pipeline'"):
        check_parallelism("pipeline")
    with pytest.raises(RTPurboError, match=r"3 sequences per step .* among 2 processes"):
        check_shares(3, Processes(count=2))
