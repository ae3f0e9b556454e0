"""`rtpurbo convert`: the plan, and bad input, neither of which may load weights."""

import shutil

import pytest
import transformers
from typer.testing import CliRunner

from rtpurbo.cli import app
from rtpurbo.conversion import run as conversion
from tests.tiny_artifact import save_tiny_base


@pytest.fixture
def config_only(tmp_path):
    """A folder that holds nothing but the config.json of a model of 32K context."""
    whole = save_tiny_base(tmp_path / "whole", max_position_embeddings=32768)
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Fails a test that loads weights or a tokenizer."""

    def fail(*arguments, **options):
        pytest.fail("weights or a tokenizer were loaded")

    monkeypatch.setattr(conversion, "load_base_model", fail)
    monkeypatch.setattr(conversion, "load_base", fail)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments):
    """The one sentence of a command that fails as foreseen."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_dry_run_needs_the_configuration_alone(config_only):
    result = run("convert", config_only, "--dry-run", "--device", "cpu", "--data", "missing.txt")
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["model"] == f"{config_only} (llama)"
    assert lines["context"] == "32,768 tokens"
    assert lines["window"].startswith("4,096 tokens")
    assert lines["calibration"] == "3 documents at 8,192 tokens"
    assert lines["data"] == "missing.txt"
    assert lines["parameters"].endswith("weights in float32")
    assert list(config_only.iterdir()) == [config_only / "config.json"]
    half = run("convert", config_only, "--dry-run", "--device", "cpu", "--dtype", "float16")
    assert "weights in float16" in half.stdout


def test_effort_and_longest_length_shape_the_plan(config_only):
    arguments = ("convert", config_only, "--dry-run", "--device", "cpu")
    result = run(*arguments, "--effort", "standard", "--max-length", 16384, "--window", 2048)
    assert (
        "no training, 3 sequences for initialisation at 4,096, 8,192 and 16,384 tokens"
        in result.stdout
    )
    assert "2,048 tokens, after" in result.stdout
    result = run(*arguments, "--effort", "thorough", "--set", "stage2.lengths=9000")
    assert "200 steps at 9,000 tokens" in result.stdout
    result = run(*arguments, "--effort", "standard", "--stage1-steps", 100)
    assert "100 steps at 8,192, 16,384 and 32,768 tokens" in result.stdout


def test_the_plan_is_printed_before_texts_are_read(config_only, tmp_path):
    result = run("convert", config_only, "-o", tmp_path / "out", "--device", "cpu",
                 "--data", "missing.txt")  # fmt: skip
    assert result.exit_code == 1
    assert result.stdout.startswith("model ")
    assert "no text file missing.txt" in result.stderr
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--set", "stage2.lengths=[2048]"], "stage 2 needs sequences longer than sinks and window "
         "(4,100 tokens), but stage2.lengths has 2,048: raise --max-length or --set stage2.lengths"),
        (["--set", "stage2.lengths=2048"], "stage 2 needs sequences longer than sinks and window"),
        (["--set", "stage1.lengths=[2048,8192]"], "stage 1 needs sequences longer than sinks"),
        (["--set", "calibration.length=2048"], "calibration needs documents longer than sinks"),
        (["--set", "stage2.lengths=abc"], "stage2.lengths is 'abc', but it must be a list of whole"),
        (["--set", "stage2.lengths=null"], "stage2.lengths is null, but it must be a list of whole"),
        (["--set", "stage2.lengths=[]"], "training needs at least one sequence length"),
        (["--set", "stage2.steps=abc"], "stage2.steps is 'abc', but it must be a whole number"),
        (["--set", "stage2.steps=null"], "stage2.steps is null, but it must be a whole number"),
        (["--set", "stage1.learning_rate=NaN"], "stage1.learning_rate is nan, but it must be a num"),
        (["--set", "attention=1"], "attention is 1, but it must be AttentionRule; name one of its"),
        (["--set", "stage2.lengths"], "--set stage2.lengths names no value"),
        (["--set", "stage2.stops=1"], "there is no setting 'stage2.stops'"),
        (["--set", "stage2.lengths=[65536]"], "do not fit the model's context of 32,768"),
        (["--max-length", "65536"], "--max-length is 65,536 tokens, but the model's context is"),
        (["--max-length", "4096"], "--max-length is 4,096 tokens, but training needs sequences"),
        (["--window", "32768"], "leaves nothing to select beyond a window of 32,768"),
        (["--window", "0"], "sliding_window (0) is smaller than block_size"),
        (["--threshold", ".5", "--ratio", ".2"], "--ratio and --threshold are mutually exclusive"),
        (["--threshold", ".5", "--count", "2"], "--threshold and --count are mutually exclusive"),
        (["--count", "99"], "99 retrieval heads were asked for, but the model has 12 query heads"),
        (["--preset", "standard"], "--preset was replaced by --effort: choose quick, standard"),
        (["--device", "abacus"], "'abacus' is not available"),
        (["--lora-rank", "0", "--dtype", "bfloat16"], "is bfloat16: pass --dtype float32, or train"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [True, False])
def test_bad_settings_are_one_sentence(config_only, tmp_path, options, sentence, dry_run):
    device = [] if "--device" in options else ["--device", "cpu"]
    last = ["--dry-run"] if dry_run else []
    output = tmp_path / "out"
    assert sentence in error_of("convert", config_only, "-o", output, *device, *options, *last)
    assert not output.exists()
    assert not output.with_name("out.work").exists()


def test_bad_settings_of_single_stages_are_one_sentence(config_only, tiny_artifact, tmp_path):
    short = ["--set", "stage1.lengths=[2048]", "--device", "cpu", "-o", tmp_path / "out"]
    (tmp_path / "map.json").write_text('{"head_map": {"retrieval_heads": [[0], []], '
                                       '"num_attention_heads": 6, "num_key_value_heads": 3}}')  # fmt: skip
    assert "stage 1 needs sequences longer" in error_of(
        "train-indexer", config_only, "--head-map", tmp_path / "map.json", *short
    )
    long = ["--set", "calibration.length=40000", "--device", "cpu", "-o", tmp_path / "out"]
    assert "calibration documents (calibration.length) of 40,000 tokens" in error_of(
        "calibrate", config_only, *long
    )
    none = ["--set", "stage2.lengths=[20]", "--device", "cpu", "-o", tmp_path / "out"]
    assert "stage 2 needs sequences longer than sinks and window (34 tokens)" in error_of(
        "distill", tiny_artifact, *none
    )


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_an_artifact_is_not_a_model(tiny_artifact, tiny_base, tmp_path, command):
    sentence = error_of(command, tiny_artifact, "-o", tmp_path / "out", "--device", "cpu")
    assert f"{tiny_artifact} is an artifact of rtpurbo, not a dense model" in sentence
    assert str(tiny_base) in sentence
    assert f"`rtpurbo distill {tiny_artifact}`" in sentence


def test_a_context_that_is_too_short(tmp_path):
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=300)
    sentence = error_of("convert", base, "-o", tmp_path / "out", "--device", "cpu")
    assert "a context of 300 tokens leaves nothing to select beyond a window of 256" in sentence


def test_a_conversion_needs_a_folder(config_only):
    assert "name one with --output-dir" in error_of("convert", config_only)
