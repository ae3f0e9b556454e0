import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_teacher
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.test_needles import corpus
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTHS = (2048, 4096)


def answered(path, samples=2):
    model = tiny_model(vocab_size=512)
    return make_teacher.answers_of(model, tiny_tokenizer(), corpus(), LENGTHS, samples, path)


def test_each_stage_reaches_its_context_and_goes_beyond_the_one_before():
    contexts = [settings.context for settings in make_teacher.STAGES.values()]
    assert contexts == sorted(set(contexts))
    assert contexts[-1] == max(make_teacher.LENGTHS) == 65536
    for settings in make_teacher.STAGES.values():
        assert max(settings.lengths) == settings.context
        assert settings.batch_tokens * settings.batches_per_step == settings.tokens
    assert make_teacher.STAGES["64k"].lora_rank == make_teacher.ADAPTER_RANK


def recipe(tmp_path, output, *options, processes=1, model=True):
    """Runs the recipe on a tiny model and returns its output."""
    base, data = tmp_path / "base", tmp_path / "walks.jsonl"
    if not base.is_dir():
        tiny_model(vocab_size=512).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        lines = [json.dumps({"text": document}) for document in corpus().documents * 4]
        data.write_text("\n".join(lines))
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    finished = subprocess.run(
        [
            sys.executable, *(launcher if processes > 1 else []), make_teacher.__file__, "--quick",
            *(["--model", base] if model else []), "--data", data, "--output", tmp_path / output, "--rank", "2",
            "--workers", "0", "--samples", "1", "--device", "cpu", *options,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def losses_of(folder):
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_resume_a_run_of_one_and_learn_the_same(tmp_path):
    alone = recipe(tmp_path, "alone")
    assert "all done" in alone
    assert "| 2K |" in alone
    assert "all done" not in recipe(tmp_path, "together", "--until", "8k")
    assert "all done" in recipe(tmp_path, "together", processes=2)
    for stage in make_teacher.STAGES:
        one, two = losses_of(tmp_path / "alone" / stage), losses_of(tmp_path / "together" / stage)
        assert len(one) == 3
        assert two == pytest.approx(one, rel=1e-3)


def test_the_adapter_is_the_teacher(tmp_path):
    recipe(tmp_path, "made")
    # The adapter names its base model.
    recipe(tmp_path, "again", "--rebuild", tmp_path / "made" / "adapter", model=False)
    teacher, again = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("made/teacher", "again")
    )
    assert set(teacher) == set(again)
    assert all(torch.equal(teacher[name], again[name]) for name in teacher)
    # What the last stage had learnt is what an adapter of its rank holds, but for rounding to bfloat16.
    stage = load_file(tmp_path / "made" / "64k" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, weight in stage.items():
        change = (weight.float() - base[name].float()).norm()
        assert (
            teacher[name].float() - weight.float()
        ).norm() <= 0.1 * change + 2**-8 * weight.float().norm()
    origin = json.loads((tmp_path / "made" / "adapter" / "difference.json").read_text())
    assert origin["rank"] == 2


def test_training_continues_from_a_given_model(tmp_path):
    recipe(tmp_path, "made", "--until", "8k")
    base = load_file(tmp_path / "base" / "model.safetensors")
    weights = load_file(tmp_path / "made" / "8k" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(size, generator=generator) for size in base[name].shape)
    added = 0.02 * torch.outer(up, down)
    weights[name] = (base[name].float() + added).to(weights[name].dtype)
    begin = shutil.copytree(tmp_path / "made" / "8k", tmp_path / "begin")
    save_file(weights, begin / "model.safetensors", {"format": "pt"})

    assert "all done" in recipe(tmp_path, "further", "--begin", begin, "--steps", "2")
    assert {path.name for path in (tmp_path / "further").iterdir() if path.is_dir()} == {
        "64k", "adapter", "teacher",
    }  # fmt: skip
    assert len(losses_of(tmp_path / "further" / "64k")) == 2
    further = load_file(tmp_path / "further" / "teacher" / "model.safetensors")
    changed = further[name].float() - base[name].float()
    assert (changed - added).norm() < 0.2 * added.norm()
    assert any(not torch.equal(further[key], weights[key]) for key in weights)


def test_answered_questions_are_not_asked_again(tmp_path, monkeypatch):
    whole = answered(tmp_path / "whole.json")
    predicted, asked = make_teacher.is_predicted, []

    def interrupted(model, example):
        asked.append(example.prompt_ids)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return predicted(model, example)

    monkeypatch.setattr(make_teacher, "is_predicted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "cut.json")
    assert answered(tmp_path / "cut.json")["right"] == whole["right"]
    # Four answers were kept; of the question that was cut, one had to be asked again.
    tasks = len(make_teacher.TASKS)
    assert len(asked) == tasks * 2 * len(LENGTHS) + 2


def test_the_table_has_a_row_for_each_length():
    right = {"4 keys": [True, True], "variables": [False, True]}
    lines = make_teacher.table({"right": {"8192": right, "65536": right}}).splitlines()
    assert lines[2].startswith("| 8K | 100 | 50 | 75 (")
    assert lines[3].startswith("| 64K | 100 | 50 | 75 (")
