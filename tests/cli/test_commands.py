import inspect
import json
import os
import re
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

import rtpurbo
from rtpurbo import conversion
from rtpurbo.cli import OUT_OF_MEMORY, PANELS, app
from rtpurbo.config import HeadMap
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import run as evaluation
from rtpurbo.evaluation.paths import log_path
from rtpurbo.evaluation.records import read_results
from rtpurbo.evaluation.samples import read_samples
from rtpurbo.interruption import StoppedBySignalError
from rtpurbo.models.artifact_config import CARD_FILE, CONFIG_FILE, INDEXER_FILE
from rtpurbo.version import __version__
from tests.evaluation.questions.support import write_questions
from tests.tiny_artifact import save_tiny_base

COMMANDS = [name for commands in PANELS.values() for name in commands]
QUICK = ["--suite", "perplexity", "--length", "128", "--samples", "1", "--device", "cpu"]


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def error_of(*arguments):
    """Error message of a command that fails with one sentence."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in result.stderr
    return message


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "copy")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(command, "--help")
    assert result.exit_code == 0
    for panel in PANELS.values():
        if command in panel:
            assert panel[command].__doc__.split("\n")[0][:40] in result.stdout


def test_help_names_every_command():
    result = run("--help")
    assert all(command in result.stdout for command in COMMANDS)


def test_version():
    assert run("--version").stdout == f"rtpurbo {__version__}\n"


def test_generate_streams_the_text(tiny_artifact):
    arguments = ("generate", tiny_artifact, "magic", "--max-new-tokens", 5, "--device", "cpu")
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert run(*arguments[:2], "-", *arguments[3:], input="magic").stdout == result.stdout
    assert run(*arguments, "--no-chat").stdout != result.stdout


def test_eval_prints_and_writes(copy, tmp_path):
    output = tmp_path / "results.json"
    result = run("eval", copy, *QUICK, "--output", output, "--write-card")
    assert result.exit_code == 0
    assert "prose 128" in result.stdout
    results = read_results(output)
    assert [record.policy for record in results.records] == ["full", "rtpurbo"]
    assert results.origin["device"] == "cpu"
    assert "prose 128" in (copy / CARD_FILE).read_text()


def test_eval_of_ruler_has_a_table_of_tasks_and_keeps_samples(tiny_artifact, tmp_path):
    output = tmp_path / "ruler.json"
    tasks = ["--suite", "ruler:niah_single_1,fwe@600", "--samples", "1", "--device", "cpu"]
    result = run("eval", tiny_artifact, *tasks, "--policy", "full", "-o", output)
    assert result.exit_code == 0
    assert re.search(r"RULER 600 .* full", result.stdout)
    assert "mean of 2" in result.stdout
    assert "ruler_words" in read_results(output).origin
    assert [item.task for item in read_samples(tmp_path / "ruler.samples.jsonl")] == [
        "niah_single_1",
        "fwe",
    ]


def test_eval_of_questions_from_files(tiny_artifact, tmp_path):
    paths = write_questions(tmp_path)
    data = [item for suite, path in paths.items() for item in ("--task-data", f"{suite}={path}")]
    suites = ["--suite", "mmlu_pro", "--suite", "humaneval", "--suite", "babilong:qa1@1024"]
    output = tmp_path / "questions.json"
    command = ["eval", tiny_artifact, *suites, *data, "--samples", 1, "--device", "cpu"]
    assert "pass --run-code to allow that" in error_of(*command)
    limits = ["--run-code", "--max-new-tokens", 4]
    result = run(*command, *limits, "--policy", "full", "-o", output)
    assert result.exit_code == 0
    assert "MMLU-Pro (1)" in result.stdout
    assert "BABILong 1K" in result.stdout
    assert {average.suite for average in read_results(output).averages} == {
        "mmlu_pro",
        "humaneval",
        "babilong",
    }
    page = tmp_path / "report.html"
    assert run("report", output, "-o", page).exit_code == 0
    assert "HumanEval (1)" in page.read_text()


def test_eval_resumes(tiny_artifact, tmp_path):
    output = tmp_path / "results.json"
    command = ["eval", tiny_artifact, *QUICK, "-o", output, "--resume"]
    assert run(*command, "--policy", "full").exit_code == 0
    [of_full] = read_results(output).records
    result = run(*command)
    assert result.exit_code == 0
    assert re.search(r"full .* rtpurbo ", result.stdout)
    assert [record.policy for record in read_results(output).records] == ["full", "rtpurbo"]
    assert read_results(output).records[0] == of_full
    assert "was measured with --seed 0, not 1" in error_of(*command, "--seed", 1)
    assert "name it with --output" in error_of("eval", tiny_artifact, *QUICK, "--resume")


def test_eval_replaces_results_only_with_force(tiny_artifact, tmp_path):
    output = tmp_path / "results.json"
    output.write_text("precious")
    command = ["eval", tiny_artifact, *QUICK, "--policy", "full", "-o", output]
    assert "pass --resume to continue it, or --force to replace it" in error_of(*command)
    assert output.read_text() == "precious"
    assert run(*command, "--force").exit_code == 0
    assert len(read_results(output).records) == 1
    # A run that was killed leaves only its log.
    output.unlink()
    assert f"{log_path(output)} exists: pass --resume" in error_of(*command)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_evaluation_exits_with_the_code_of_the_signal(
    tiny_artifact, tmp_path, monkeypatch, number, code
):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: os.kill(os.getpid(), number))
    result = run("eval", tiny_artifact, *QUICK, "-o", tmp_path / "results.json")
    assert result.exit_code == code
    assert re.search(r"stopped by SIG\w+: pass --resume to the same command", result.stderr)
    result = run("eval", tiny_artifact, *QUICK)
    assert result.exit_code == code
    assert re.search(r"stopped by SIG\w+: what was measured is lost; name a file", result.stderr)


def test_inspect_shows_the_heads(tiny_artifact):
    assert "layer   0  ● ● · ·" in run("inspect", tiny_artifact).stdout


def test_report_writes_a_page(tiny_artifact, tmp_path):
    output = tmp_path / "new" / "report.html"
    result = run("report", tiny_artifact, "-o", output)
    assert result.stdout == f"Written to {output}.\n"
    assert "4 of 12" in output.read_text()
    assert "no file of results" in error_of("report", tmp_path / "missing.json", "-o", output)
    assert "is a second one" in error_of("report", tiny_artifact, tiny_artifact)
    assert "not an rtpurbo artifact" in error_of("report", tmp_path)


@pytest.mark.parametrize(
    ("function", "command", "changes"),
    [
        (
            "convert",
            "convert M -o out --effort quick --max-length 512 --ratio .2 --window 64 --top-p .9 --reading far "
            "--index-space pre_rope --index-dim 8 --stage1-steps 3 --stage2-steps 0 --lora-rank 4",
            {
                "calibration.ratio": 0.2,
                "attention.sliding_window": 64,
                "attention.top_p": 0.9,
                "attention.reading": "far",
                "indexer.index_space": "pre_rope",
                "indexer.index_dim": 8,
                "stage1.steps": 3,
                "stage2.steps": 0,
                "stage2.lora_rank": 4,
            },
        ),
        ("calibrate", "calibrate M -o out --count 3", {"calibration.count": 3}),
        (
            "train_indexer",
            "train-indexer M --head-map map.json -o out --stage1-steps 3",
            {"stage1.steps": 3},
        ),
        ("distill", "distill A -o out --lora-rank 0", {"stage2.lora_rank": 0}),
    ],
)
def test_options_reach_the_function(monkeypatch, function, command, changes):
    calls = []
    real = getattr(conversion, function)
    assert getattr(rtpurbo, function) is real

    def spy(*arguments, **options):
        call = inspect.signature(real).bind(*arguments, **options).arguments
        calls.append(call | call.pop("options", {}))
        return HeadMap.uniform([], [], 4, 2) if function == "calibrate" else Path("out")

    monkeypatch.setattr(conversion, function, spy)
    result = run(*command.split(), "--data", "a.txt", "--data", "b.txt", "--seed", 3, "--force")
    assert result.exit_code == 0, result.stderr
    [call] = calls
    assert call["changes"] == changes | {"seed": 3}
    assert call["data"] == ["a.txt", "b.txt"]
    assert call["device"] == "auto"
    assert call["force"] is True


def test_a_missing_artifact(monkeypatch, tmp_path):
    def unreachable(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for command in (["inspect", "nowhere"], ["eval", "nowhere"], ["generate", "nowhere", "x"]):
        assert "nowhere is not a folder" in error_of(*command)
    assert "not an rtpurbo artifact" in error_of("inspect", tmp_path)


def test_a_corrupt_artifact(copy):
    (copy / INDEXER_FILE).write_bytes(b"0")
    assert "corrupt or truncated" in error_of("generate", copy, "x")
    (copy / CONFIG_FILE).write_text("{")
    assert "corrupt or truncated" in error_of("inspect", copy)


def test_a_newer_artifact(copy):
    path = copy / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    assert "upgrade rtpurbo" in error_of("generate", copy, "x")


def test_an_artifact_of_another_base(tiny_artifact, tmp_path):
    other = save_tiny_base(tmp_path / "other", seed=1)
    for command in (["generate", tiny_artifact, "x"], ["eval", tiny_artifact, *QUICK]):
        message = error_of(*command, "--base-model", other, "--device", "cpu")
        assert "belongs to another base model" in message


def test_eval_of_a_missing_artifact(tiny_artifact):
    assert "there is no policy 'x'" in error_of("eval", tiny_artifact, *QUICK, "--policy", "x")
    assert "there is no suite 'x'" in error_of("eval", tiny_artifact, *QUICK, "--suite", "x")
    assert "context of 1,024" in error_of("eval", tiny_artifact, *QUICK, "--length", "4096")
    quick = ["eval", tiny_artifact, "--length", "512", "--device", "cpu"]
    assert "no ruler task 'x'" in error_of(*quick, "--suite", "ruler", "--tasks", "x")
    assert "'lm-eval' needs tasks" in error_of(*quick, "--suite", "lm-eval")
    assert "--task-data x names no value" in error_of(*quick, "--task-data", "x")
    assert "nothing.txt" in error_of(*quick, "--data", "nothing.txt")


def test_generate_beyond_the_context_and_from_an_empty_prompt(tiny_artifact):
    generate = ["generate", tiny_artifact, "--device", "cpu"]
    assert "context of 1,024" in error_of(*generate, "word " * 3000)
    assert "the prompt is empty" in error_of(*generate, "", "--no-chat")


def test_a_device_that_is_not_there(tiny_artifact):
    assert "'abacus' is not available" in error_of(
        "generate", tiny_artifact, "x", "--device", "abacus"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_out_of_memory_comes_with_advice(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(conversion, "convert", fail)
    assert error_of("convert", "-o", "out") == f"error: {OUT_OF_MEMORY}"


def test_only_foreseen_errors_are_one_sentence(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(conversion, "convert", fail)
    result = run("convert", "-o", "out")
    assert repr(result.exception) == "RuntimeError('a bug')"


def test_the_message_is_that_of_the_error(monkeypatch):
    def fail(*arguments, **options):
        raise RTPurboError("something is wrong.")

    monkeypatch.setattr(conversion, "convert", fail)
    assert error_of("convert", "-o", "out") == "error: something is wrong."


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_exits_with_the_code_of_the_signal(monkeypatch, number, code):
    def stop(*arguments, **options):
        raise StoppedBySignalError(number, "after step 3 of stage1")

    monkeypatch.setattr(conversion, "convert", stop)
    result = run("convert", "-o", "out")
    assert result.exit_code == code
    assert "after step 3 of stage1: pass --resume" in result.stderr


def test_only_one_of_several_processes_prints(monkeypatch):
    monkeypatch.setattr(conversion, "convert", lambda *arguments, **options: Path("out"))
    assert "Written to out" in run("convert", "-o", "out").stdout
    monkeypatch.setenv("RANK", "1")
    assert run("convert", "-o", "out").stdout == ""


def test_parallel_options(tiny_base, tmp_path):
    arguments = [tiny_base, "-o", tmp_path / "out", "--device", "cpu"]
    assert "tensor parallelism" in error_of("convert", *arguments, "--parallel", "tensor")
    assert "no tracker 'x'" in error_of("convert", *arguments, "--report-to", "x")
    assert "name files or datasets" in error_of("convert", *arguments, "--stream")


def test_escape_codes_in_an_artifact_are_escaped(copy):
    path = copy / CONFIG_FILE
    data = json.loads(path.read_text())
    data["base_model"] |= {"architecture": "Evil\x1b[31m\x9b2J[bold]ForCausalLM"}
    path.write_text(json.dumps(data))
    (copy / "file\x1b]0;title\x07").write_text("")
    shown = run("inspect", copy).stdout
    assert "Evil\\x1b[31m\\x9b2J[bold]ForCausalLM" in shown
    assert "file\\x1b]0;title\\x07" in shown
    assert not {"\x1b", "\x9b", "\x07"} & set(shown)
    assert "\\x1b[2J" in error_of("inspect", "nowhere\x1b[2J")


def test_escape_codes_in_an_answer_are_escaped(tiny_artifact, monkeypatch):
    def decode(self, *args, **options):
        return "an answer \x1b[2J\n"

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", decode)
    shown = run("generate", tiny_artifact, "x", "--max-new-tokens", 3, "--device", "cpu").stdout
    assert "\\x1b[2J" in shown
    assert "\x1b" not in shown
