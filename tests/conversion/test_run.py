"""Conversion from start to end on a tiny model: what it leaves, and what an interruption does to it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rtpurbo.config import AttentionRule, IndexerSettings
from rtpurbo.conversion import calibrate, convert, distill, train_indexer
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import LOG_FILE, ArtifactConfig
from rtpurbo.models.base import load_base_model
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.renamed_settings import RENAMED
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
    StreamSettings,
)
from rtpurbo.training import pools

SETTINGS = ConversionSettings(
    attention=AttentionRule(sliding_window=64, min_tokens=8, block_size=16),
    indexer=IndexerSettings(index_dim=4),
    calibration=CalibrationSettings(length=384, num_documents=2, count=3, top_p_sequences=2),
    stage1=IndexerTrainingSettings(
        steps=30, lengths=(800,), steps_per_sequence=8, queries_per_step=32, warmup_steps=2,
        init_sequences=1, probe_sequences=1, probe_every=15,
    ),
    stage2=DistillationSettings(
        steps=6, lengths=(800,), targets_per_sequence=64, warmup_steps=1, lora_rank=2,
        refresh_steps=10, checkpoint_every=2,
    ),
)  # fmt: skip


class InterruptionError(Exception):
    """Stands for a killed process."""


def interrupt_at(stage, step):
    def progress(current, done, total, figures):
        if (current, done) == (stage, step):
            raise InterruptionError

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    """The artifact of an uninterrupted conversion."""
    return convert(
        str(tiny_base),
        tmp_path_factory.mktemp("whole") / "artifact",
        settings=SETTINGS,
        device="cpu",
    )


def test_an_artifact_is_complete_and_loads(whole):
    assert set(contents(whole)) == {
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "indexer.safetensors",
        "indexer_before_stage2.safetensors",
        "rtpurbo_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }
    assert not whole.with_name("artifact.work").exists()
    model, tokenizer = load(whole)
    ids = torch.tensor([tokenizer("One of the special magic numbers").input_ids])
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] > ids.shape[1]


def test_the_log_has_every_step(whole):
    entries = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    steps = [(entry["stage"], entry["step"]) for entry in entries]
    expected = {"stage1": 30, "stage2": 6, "refresh": 10}
    assert steps == [
        (name, step) for name, count in expected.items() for step in range(1, count + 1)
    ]
    stage1 = [entry["loss"] for entry in entries if entry["stage"] == "stage1"]
    assert sum(stage1[-5:]) < sum(stage1[:5])


def test_each_layer_has_a_top_p(whole, tiny_base, tmp_path):
    artifact = ArtifactConfig.read(whole)
    by_layer = artifact.config.attention.layer_top_p
    assert by_layer == tuple(artifact.figures["top_p"]["values"])
    costs = artifact.figures["top_p"]["costs"]
    heads = artifact.config.head_map.retrieval_heads
    assert set(costs) == {str(layer) for layer, each in enumerate(heads) if each}
    assert artifact.settings["attention"]["layer_top_p"] is None
    assert [layer.rule.top_p for layer in headwise_modules(load(whole)[0])] == list(by_layer)


def test_a_model_without_retrieval_heads_has_one_top_p(tiny_base, tmp_path):
    calibration = replace(SETTINGS.calibration, count=0)
    stage2 = replace(SETTINGS.stage2, steps=0)
    settings = replace(SETTINGS, calibration=calibration, stage2=stage2)
    convert(str(tiny_base), tmp_path / "artifact", settings=settings, device="cpu")
    artifact = ArtifactConfig.read(tmp_path / "artifact")
    assert artifact.config.attention.layer_top_p is None
    assert "top_p" not in artifact.figures


def test_values_that_settings_name_are_kept(tiny_base, tmp_path):
    rule = replace(SETTINGS.attention, layer_top_p=(0.5, 0.7))
    settings = replace(SETTINGS, attention=rule, stage2=replace(SETTINGS.stage2, steps=0))
    convert(str(tiny_base), tmp_path / "artifact", settings=settings, device="cpu")
    artifact = ArtifactConfig.read(tmp_path / "artifact")
    assert artifact.config.attention.layer_top_p == (0.5, 0.7)
    assert "top_p" not in artifact.figures


def test_before_stage2_is_kept_apart(whole):
    ids = torch.arange(100)[None]
    after, before = (load(whole, stage2=stage2)[0](ids).logits for stage2 in (True, False))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("calibrate", 1), ("stage1", 1), ("stage1", 25), ("teacher", 3), ("stage2", 1), ("stage2", 5),
     ("refresh", 4), ("top-p", 1)],
)  # fmt: skip
def test_a_resumed_conversion_ends_the_same(stage, step, whole, tiny_base, tmp_path):
    output = tmp_path / "artifact"
    with pytest.raises(InterruptionError):
        convert(
            str(tiny_base),
            output,
            settings=SETTINGS,
            device="cpu",
            progress=interrupt_at(stage, step),
        )
    assert not output.exists()
    with pytest.raises(RTPurboError, match="--resume"):
        convert(str(tiny_base), output, settings=SETTINGS, device="cpu")
    convert(str(tiny_base), output, settings=SETTINGS, device="cpu", resume=True)
    assert contents(output) == contents(whole)
    assert not list(tmp_path.glob("*.work"))


def test_a_resumed_calibration_repeats_no_finished_step(tiny_base, tmp_path):
    gates = CalibrationSettings(
        length=384, num_documents=12, ratio=0.25, ranking="gates", max_divergence=1.0,
        granularity="kv_group", top_p_sequences=3,
    )  # fmt: skip
    settings = replace(
        SETTINGS,
        calibration=gates,
        stage1=replace(SETTINGS.stage1, steps=0),
        stage2=replace(SETTINGS.stage2, steps=0),
    )
    common = {"settings": settings, "device": "cpu"}
    whole = convert(str(tiny_base), tmp_path / "whole", **common)
    output = tmp_path / "artifact"
    steps = []
    for stage, step in (("gates", 11), ("top-p", 2), (None, None)):
        interrupt = interrupt_at(stage, step)

        def progress(current, done, *rest, interrupt=interrupt):
            if current in ("gates", "top-p"):
                steps.append((current, done))
            interrupt(current, done, *rest)

        with pytest.raises(InterruptionError) if stage else nullcontext():
            convert(str(tiny_base), output, resume=True, progress=progress, **common)
    assert steps == [
        *(("gates", step) for step in range(1, 12)),
        *(("gates", step) for step in (11, 12)),  # the last checkpoint has ten steps
        *(("top-p", step) for step in (1, 2, 3)),
    ]
    assert contents(output) == contents(whole)


def test_a_conversion_that_an_earlier_version_began_is_resumed(whole, tiny_base, tmp_path):
    output = tmp_path / "artifact"
    common = {"settings": SETTINGS, "device": "cpu"}
    with pytest.raises(InterruptionError):
        convert(str(tiny_base), output, progress=interrupt_at("stage1", 25), **common)
    path = tmp_path / "artifact.work" / "plan.json"
    plan = json.loads(path.read_text())
    for part, names in RENAMED.items():
        recorded = plan["settings"][part]
        mixture = recorded.pop("mixture")
        for former, present in names.items():
            _, _, task = present.partition("mixture.")
            recorded[former] = mixture.get(task, 0.0) if task else recorded.pop(present)
    assert plan["settings"]["stage1"]["needle_share"] == 0.5
    path.write_text(json.dumps(plan))
    convert(str(tiny_base), output, resume=True, **common)
    assert contents(output) == contents(whole)


def test_a_streamed_conversion_resumes_the_same(tiny_base, tmp_path):
    pytest.importorskip("datasets")
    text = tmp_path / "texts.jsonl"
    lines = [f"Document {n} tells of number {n * n}. " * (30 + 7 * (n % 5)) for n in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = replace(
        SETTINGS,
        stream=StreamSettings(enabled=True, buffer_size=8, held_out=8),
        stage1=replace(SETTINGS.stage1, steps_per_sequence=2),
    )
    common = {"settings": settings, "data": [str(text)], "device": "cpu"}
    whole = convert(str(tiny_base), tmp_path / "whole", **common)
    output = tmp_path / "artifact"
    for stage, step in (("stage1", 21), ("teacher", 3), ("stage2", 3)):
        with pytest.raises(InterruptionError):
            convert(
                str(tiny_base), output, resume=True, progress=interrupt_at(stage, step), **common
            )
    convert(str(tiny_base), output, resume=True, **common)
    assert contents(output) == contents(whole)


def test_pools_are_trained_on_and_reused_by_a_resumed_conversion(tiny_base, tmp_path, monkeypatch):
    shorter = partial(pools.write_conversations, max_user_tokens=16, max_answer_tokens=16)
    monkeypatch.setattr(pools, "write_conversations", shorter)
    common = {
        "settings": SETTINGS,
        "changes": {
            "stage1.mixture": {"documents": 1.0},
            "stage2.mixture.needles": 0.2,
            "stage2.mixture.documents": 0.4,
            "stage2.mixture.conversations": 0.4,
            "stage2.lora_scale": None,
        },
        "device": "cpu",
    }
    stages = []
    whole = convert(
        str(tiny_base),
        tmp_path / "whole",
        progress=lambda stage, *_: stages.append(stage),
        **common,
    )
    assert list(dict.fromkeys(stages))[:4] == [
        "documents",
        "user turns",
        "conversations",
        "calibrate",
    ]
    output = tmp_path / "artifact"
    with pytest.raises(InterruptionError):
        convert(str(tiny_base), output, progress=interrupt_at("stage2", 3), **common)
    stages.clear()
    convert(
        str(tiny_base),
        output,
        resume=True,
        progress=lambda stage, *_: stages.append(stage),
        **common,
    )
    assert not {"documents", "user turns", "conversations"} & set(stages)
    assert contents(output) == contents(whole)


def test_interrupted_between_the_artifact_and_the_cleanup(whole, tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "artifact"

    def stop(path, **options):
        if Path(path).suffix == ".work" and output.exists():
            raise InterruptionError
        return rmtree(path, **options)

    rmtree = shutil.rmtree
    monkeypatch.setattr("rtpurbo.conversion.job.shutil.rmtree", stop)
    with pytest.raises(InterruptionError):
        convert(str(tiny_base), output, settings=SETTINGS, device="cpu")
    monkeypatch.undo()
    convert(str(tiny_base), output, settings=SETTINGS, device="cpu", resume=True)
    assert contents(output) == contents(whole)
    assert not list(tmp_path.glob("*.work"))


def test_a_library_call_leaves_signal_handlers_alone(tiny_base, tmp_path):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def progress(stage, done, total, figures):
        seen.append(handlers())
        if (stage, done) == ("stage1", 2):
            raise InterruptionError

    before, seen = handlers(), []
    with pytest.raises(InterruptionError):
        convert(
            str(tiny_base), tmp_path / "out", settings=SETTINGS, device="cpu", progress=progress
        )
    assert seen == [before] * len(seen)
    assert len(seen) > 2


def test_resuming_without_a_job_does_not_replace_an_artifact(tiny_base, tmp_path):
    """A script may always pass `--resume`, which does not permit replacing a finished artifact."""
    output = tmp_path / "artifact"
    settings = replace(SETTINGS, stage2=replace(SETTINGS.stage2, steps=0))

    def take_the_place(stage, done, total, figures):
        output.mkdir(exist_ok=True)
        (output / "of-somebody-else").touch()

    with pytest.raises(RTPurboError, match="exists already"):
        convert(
            str(tiny_base),
            output,
            settings=settings,
            device="cpu",
            resume=True,
            progress=take_the_place,
        )
    assert list(contents(output)) == ["of-somebody-else"]


def test_resuming_another_job_is_refused(tiny_base, tmp_path):
    output = tmp_path / "artifact"
    with pytest.raises(InterruptionError):
        convert(
            str(tiny_base),
            output,
            settings=SETTINGS,
            device="cpu",
            progress=interrupt_at("stage1", 2),
        )
    other = replace(SETTINGS, seed=1)
    with pytest.raises(RTPurboError, match="another model, data or settings"):
        convert(str(tiny_base), output, settings=other, device="cpu", resume=True)


def test_an_existing_folder_needs_force(whole, tiny_base):
    with pytest.raises(RTPurboError, match="--force"):
        convert(str(tiny_base), whole, settings=SETTINGS, device="cpu")


def test_stages_one_by_one(whole, tiny_base, tmp_path):
    common = {"settings": SETTINGS, "device": "cpu"}
    head_map = tmp_path / "head_map.json"
    calibrate(str(tiny_base), head_map, **common)
    with pytest.raises(RTPurboError, match="--force"):
        calibrate(str(tiny_base), head_map, **common)
    stage1 = train_indexer(str(tiny_base), head_map, tmp_path / "stage1", **common)
    assert ArtifactConfig.read(stage1).stage2 == "none"
    stage2 = distill(stage1, tmp_path / "stage2", **common)
    for name in ("indexer.safetensors", "adapter/adapter_model.safetensors", LOG_FILE):
        assert (stage2 / name).read_bytes() == (whole / name).read_bytes()
    found, expected = ArtifactConfig.read(stage2), ArtifactConfig.read(whole)
    # A wavelength left open is filled in by what comes first.
    filled = {"indexer": found.settings["indexer"]}
    assert found.settings == expected.settings | filled
    assert found.figures == expected.figures


def test_calibration_alone_uses_the_attention_rule_of_its_settings(tiny_base, tmp_path):
    changes = {"calibration.ranking": "gates", "calibration.granularity": "kv_group"}
    scores = []
    for sinks in (4, 60):
        output = tmp_path / f"{sinks}.json"
        of_rule = replace(SETTINGS, attention=replace(SETTINGS.attention, num_sink_tokens=sinks))
        calibrate(str(tiny_base), output, settings=of_rule, changes=changes, device="cpu")
        scores.append(json.loads(output.read_text())["head_map"]["scores"])
    assert scores[0] != scores[1]


def test_the_number_of_heads_by_the_divergence_of_answers(tiny_base, tmp_path):
    gates = CalibrationSettings(
        length=384, num_documents=2, ratio=0.25, ranking="gates", max_divergence=1e-9
    )
    few = {"settings": replace(SETTINGS, calibration=gates), "device": "cpu"}
    stage2 = {"stage2.steps": 0}
    convert(str(tiny_base), tmp_path / "found", changes=stage2, **few)
    found = ArtifactConfig.read(tmp_path / "found")
    assert found.config.head_map.num_retrieval_heads == found.config.head_map.num_heads
    tried = found.figures["divergences"]
    assert next(iter(tried)) == "0.25"
    assert abs(list(tried.values())[-1]) < 1e-6 < tried["0.25"]
    assert "| Answers with these heads | diverge by" in (tmp_path / "found/README.md").read_text()
    distill(tmp_path / "found", tmp_path / "later", changes=stage2, device="cpu")
    assert ArtifactConfig.read(tmp_path / "later").figures["divergences"] == tried
    # A ratio that is asked for is not raised.
    convert(
        str(tiny_base), tmp_path / "asked", changes={**stage2, "calibration.ratio": 0.25}, **few
    )
    asked = ArtifactConfig.read(tmp_path / "asked")
    assert asked.config.head_map.num_retrieval_heads == 0.25 * asked.config.head_map.num_heads
    assert "divergences" not in asked.figures


def test_a_single_stage_uses_the_settings_of_the_previous_ones(tiny_base, tmp_path):
    """Settings that are not given again are those of the previous command."""
    head_map, common = tmp_path / "head_map.json", {"device": "cpu"}
    own = {"calibration.length": 600, "calibration.ranking": "interleaved"}
    calibrate(str(tiny_base), head_map, changes=own, **common)
    # A file of an earlier version.
    head_map.write_text(head_map.read_text().replace('"interleaved"', '"turns"'))
    assert '"turns"' in head_map.read_text()
    lengths = {"stage1.lengths": (700, 900), "stage1.steps": 2, "attention.sliding_window": 512}
    stage1 = train_indexer(str(tiny_base), head_map, tmp_path / "stage1", changes=lengths, **common)
    few = {"stage2.steps": 1, "stage2.lengths": (800,), "stage2.refresh_steps": 1}
    stage2 = distill(stage1, tmp_path / "stage2", changes=few, **common)
    found = ArtifactConfig.read(stage2).settings
    assert found["calibration"]["ranking"] == "interleaved"
    assert found["calibration"]["length"] == 600
    assert found["stage1"]["lengths"] == [700, 900]
    assert found["stage1"]["steps"] == 2
    assert found["attention"]["sliding_window"] == 512
    with pytest.raises(RTPurboError, match="longer than sinks and window"):
        distill(stage1, tmp_path / "short", changes={**few, "stage1.lengths": (300,)}, **common)
    assert not (tmp_path / "short.work").exists()


def test_full_weights_instead_of_lora(tiny_base, tmp_path):
    settings = replace(SETTINGS, stage2=replace(SETTINGS.stage2, lora_rank=0, refresh_steps=0))
    output = convert(str(tiny_base), tmp_path / "artifact", settings=settings, device="cpu")
    assert ArtifactConfig.read(output).stage2 == "full"
    model, _ = load(output)
    dense = load_base_model(str(tiny_base)).model
    assert not torch.equal(model.lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration.length": 5000}, "do not fit the model's context of 1,024"),
        ({"stage2.lengths": (800, 2000)}, "do not fit the model's context of 1,024"),
        ({"calibration.ratio": 1.5}, "ratio of retrieval heads is 1.5"),
        ({"attention.top_p": 0.0}, "top_p is 0.0"),
        ({"attention.sliding_window": 8}, "smaller than block_size"),
        ({"stage1.lengths": (60,)}, "longer than sinks and window"),
        ({"no.such": 1}, "no setting 'no.such'"),
    ],
)
def test_impossible_settings_are_refused(changes, message, tiny_base, tmp_path):
    with pytest.raises(RTPurboError, match=message):
        convert(
            str(tiny_base), tmp_path / "artifact", settings=SETTINGS, changes=changes, device="cpu"
        )
    assert not (tmp_path / "artifact").exists()


def test_text_shorter_than_a_sequence(tiny_base, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A short text. " * 40)
    with pytest.raises(RTPurboError, match=r"short\.txt.* has only"):
        convert(
            str(tiny_base), tmp_path / "artifact", settings=SETTINGS, data=[str(text)], device="cpu"
        )


_SCRIPT = """
import resource, sys
from rtpurbo.conversion import convert
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from tests.conversion.test_run import SETTINGS
if len(sys.argv) > 3:
    # Limit of a file's size in bytes: a longer write fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    with stopping_cleanly():
        convert(sys.argv[1], sys.argv[2], settings=SETTINGS, device="cpu", resume=True)
except StoppedBySignalError as error:
    sys.exit(error.exit_code)
except RTPurboError as error:
    sys.exit(str(error))
"""


def command_and_surroundings(*arguments):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [sys.executable, "-c", _SCRIPT, *(str(argument) for argument in arguments)]
    return command, {"env": environment, "cwd": root}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_at_random_moments(number, whole, tiny_base, tmp_path):
    """A signal at any moment loses no more than the steps since the last checkpoint."""
    output, rng = tmp_path / "artifact", random.Random(0)
    command, surroundings = command_and_surroundings(tiny_base, output)
    log, codes = tmp_path / "artifact.work" / "training_log.jsonl", []
    while not output.exists():
        # A few steps further than the last one got, and any time in a step.
        steps = number_of_lines(log) + rng.randint(1, 9)
        process = subprocess.Popen(command, **surroundings)
        while process.poll() is None and number_of_lines(log) < steps:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(number)
        codes.append(process.wait())
    assert len(codes) >= 4
    # The last signal may have come when all was done.
    assert set(codes[:-1]) == {143 if number == signal.SIGTERM else -number}
    assert contents(output) == contents(whole)


def number_of_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_full_disk_is_named_and_costs_nothing(whole, tiny_base, tmp_path):
    """Files that cannot grow beyond a limit: first the log, then a checkpoint, then the weights."""
    output = tmp_path / "artifact"
    sizes = sorted(len(content) for content in contents(whole).values())
    said = []
    for limit in (1500, 4000, 9000, sizes[-1] - 1):
        command, surroundings = command_and_surroundings(tiny_base, output, limit)
        finished = subprocess.run(command, **surroundings, capture_output=True, text=True)
        assert finished.returncode == 1, finished.stderr[-2000:]
        assert "Traceback" not in finished.stderr
        said.append(finished.stderr.strip().splitlines()[-1])
        assert re.search(r"no space left on the disk to write .*--resume", said[-1]), said[-1]
        assert not output.exists()
    assert len({line.split(" to write ")[1] for line in said}) > 1, said
    command, surroundings = command_and_surroundings(tiny_base, output)
    subprocess.run(command, **surroundings, check=True)
    assert contents(output) == contents(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {"stage1": 5}}', "[" * 100_000])
def test_a_broken_plan_of_an_interrupted_conversion_is_named(tiny_base, tmp_path, content):
    work = tmp_path / "artifact.work"
    work.mkdir()
    (work / "plan.json").write_text(content)
    with pytest.raises(RTPurboError, match=r"plan\.json is broken"):
        convert(str(tiny_base), tmp_path / "artifact", settings=SETTINGS, resume=True)
    assert not list(tmp_path.glob("*.lock"))
