import json

import pytest

from rtpurbo.benchmarks import decode
from rtpurbo.cli import app
from rtpurbo.reporting import figures
from tests.cli.test_commands import error_of, run

TINY = [
    "--heads", 2, "--kv-heads", 1, "--head-dim", 16, "--retrieval-heads", 1, "--window", 64,
    "--dtype", "float16", "--device", "cpu", "--repeats", 1,
]  # fmt: skip


COMMANDS = ["prefill", "decode", "model", "training"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_explains_itself(command):
    result = run("bench", command, "--help")
    assert result.exit_code == 0
    assert "--implementation" in result.stdout
    assert "--device" not in result.stdout


def test_the_help_lists_the_command():
    assert "bench" in run("--help").stdout
    assert all(name in run("bench", "--help").stdout for name in COMMANDS)
    assert app.registered_groups


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_gpu(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "benchmarks need an NVIDIA GPU" in error_of("bench", command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--implementation", "magic"], "no implementation 'magic' here"),
        (["decode", "--implementation", "flex"], "no implementation 'flex' here"),
        (["prefill", "--density", "1.5"], "--density is 1.5"),
        (["decode", "--density", "0"], "--density is 0"),
        (["model", "--decode-density", "2"], "--density is 2"),
        (["prefill", "--heads", "6", "--kv-heads", "4"], "cannot share 4 KV heads"),
        (["decode", "--heads", "4", "--retrieval-heads", "5"], "only 4 query heads"),
        (["prefill", "--row-stride", "3"], "row_stride is 3"),
        (["prefill", "--device", "abacus"], "'abacus' is not available"),
        (["model", "--geometry", "giant", "--device", "cpu"], "no geometry 'giant'"),
        (["model", "--artifact", "nowhere", "--device", "cpu"], "nowhere is not a folder"),
        (["model", "--artifact", "some", "--geometry", "qwen3-8b"], "--geometry applies to random"),
        (["model", "--artifact", "some", "--decode-density", "0.1"], "--decode-density applies to"),
        (["model", "--artifact", "some", "--row-stride", "2"], "--row-stride applies to random"),
        (["model", "--data", "books.txt"], "--data needs the model of an artifact"),
        (
            ["model", "--phase", "prefill", "--memory", "80"],
            "--memory applies to decode steps only",
        ),
        (["training", "--implementation", "flex"], "no implementation 'flex' here"),
        (["training", "--documents", "9", "--device", "cpu"], "nothing to learn"),
        (["training", "--phase", "stage2", "--documents", "2"], "--documents is for stage 1"),
        (
            ["training", "--phase", "stage2", "--length", "99", "--device", "cpu"],
            "nothing would be sparse",
        ),
        (["prefill", "--profile", "nowhere", "--device", "cpu"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    assert message in error_of("bench", *arguments)


def test_a_plot_that_cannot_be_drawn_is_refused_before_measuring(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert "needs matplotlib" in error_of("bench", "decode", "--plot", "speed.png")


def test_a_step_from_options_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_SETS", 1)
    output = tmp_path / "new" / "speed.json"
    peers = ["--implementation", "sdpa-flash", "--implementation", "sdpa-cudnn"]
    result = run("bench", "decode", "--length", 256, *TINY, *peers, "-o", output)
    assert result.exit_code == 0, result.output
    assert "sdpa-flash" in result.stdout
    assert "note: decode sdpa-cudnn" in result.stdout
    data = json.loads(output.read_text())
    assert data["device"] == "cpu"
    assert [record["implementation"] for record in data["records"]] == ["sdpa-flash"]
    assert [record["dtype"] for record in data["records"]] == ["float16"]
    assert "decode (cpu, float16)" in result.stdout


def test_the_model_of_an_artifact_from_options_to_a_plot(tiny_artifact, tmp_path):
    output = tmp_path / "speed.json"
    result = run(
        "bench", "model", "--artifact", tiny_artifact, "--phase", "decode", "--length", 128,
        "--batch", 2, "--repeats", 1, "--device", "cpu", "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = json.loads(output.read_text())["records"]
    assert {record["implementation"] for record in records} == {"sdpa-flash", "rtpurbo"}
    assert {record["batch_size"] for record in records} == {2}
    shown = run("bench", "show", output, "--markdown", "--plot", tmp_path / "speed.svg")
    assert "model-decode: artifact artifact, 2 layers" in shown.stdout
    assert "artifact artifact, 2 layers" in (tmp_path / "speed.svg").read_text()


def test_a_peer_far_off_its_earlier_time_is_flagged(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_SETS", 1)
    options = ["--length", 256, *TINY, "--implementation", "sdpa-flash"]
    first, second = tmp_path / "earlier" / "first.json", tmp_path / "second.json"
    assert run("bench", "decode", *options, "-o", first).exit_code == 0
    data = json.loads(first.read_text())
    data["records"][0] |= {"milliseconds": 1e-6, "dtype": "float16"}
    first.write_text(json.dumps(data))
    result = run("bench", "decode", *options, "--earlier", first.parent, "-o", second)
    assert "measuring again" in result.stderr
    assert "! far off the usual time" in " ".join(result.stdout.split())
    [record] = json.loads(second.read_text())["records"]
    assert record["usual_milliseconds"] == 1e-6


def test_a_wrong_result_ends_in_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("rtpurbo.benchmarks.prefill.compare", lambda *args: Wrong())
    result = run(
        "bench", "prefill", "--length", 256, *TINY, "--implementation", "eager",
        "-o", tmp_path / "speed.json",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "error: prefill eager at 256 tokens is not recorded: it is wrong." in result.stderr


class Wrong:
    complaint = "it is wrong"


def test_bench_show_combines_files(tmp_path):
    for command in ("prefill", "decode"):
        options = ["--length", 128, "--implementation", "rtpurbo", "--implementation", "sdpa-flash"]
        if command == "prefill":
            options = ["--length", 128, "--implementation", "sdpa-flash"]
        run("bench", command, *TINY, *options, "-o", tmp_path / f"{command}.json")
    files = [tmp_path / "prefill.json", tmp_path / "decode.json"]
    shown = run("bench", "show", *files).stdout
    assert all(word in shown for word in ("prefill", "decode", "sdpa-flash", "implementation"))
    assert "…" not in shown
    shown = run("bench", "show", *files, "--markdown", "--implementation", "rtpurbo").stdout
    assert "| rtpurbo |" in shown
    assert "sdpa-flash" not in shown
    assert "no record is left" in error_of("bench", "show", *files, "--batch", 7)
    assert "no file of benchmarks" in error_of("bench", "show", tmp_path / "none.json")
