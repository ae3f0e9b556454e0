import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rtpurbo
from rtpurbo.cli import app
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import (
    CHECKPOINT_KEY,
    CONFIG_FILE,
    MODEL_CONFIG_FILE,
    is_checkpoint,
)
from rtpurbo.serving import server
from rtpurbo.serving.export import export
from rtpurbo.serving.installation import Installation
from rtpurbo.serving.server import (
    CPU_CACHE_BYTES,
    GIB,
    SERVER_MODULE,
    ServerSettings,
    prepare_checkpoint,
    served_capacity,
    server_command,
)
from tests.serving.vllm_stand_in import write_stand_in
from tests.tiny_artifact import save_tiny_artifact

CPU, GPU = Installation("0.32.0", True), Installation("0.32.0", False)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("RTPURBO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tiny_artifact, tmp_path):
    return export(tiny_artifact, tmp_path / "vllm", "vllm")


def options_of(checkpoint, settings=None, installation=GPU):
    command = server_command(checkpoint, "name", settings or ServerSettings(), installation)
    assert command[:3] == [sys.executable, "-m", SERVER_MODULE]
    return dict(zip(command[3::2], command[4::2], strict=True))


def test_an_export_is_served_as_it_is(checkpoint, cache):
    assert prepare_checkpoint(checkpoint) == checkpoint
    assert not cache.exists()


def test_an_artifact_is_exported_once_and_again_when_it_changes(tiny_base, tmp_path, monkeypatch):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base, stage2="lora")
    first = prepare_checkpoint(artifact)
    assert is_checkpoint(first)
    with monkeypatch.context() as patch:
        patch.setattr(server, "export", None)  # nothing is exported a second time
        assert prepare_checkpoint(str(artifact)) == first
    (artifact / CONFIG_FILE).write_text((artifact / CONFIG_FILE).read_text() + " ")
    assert prepare_checkpoint(artifact) != first


def test_an_export_of_another_process_is_taken(tiny_artifact, monkeypatch):
    def slower(artifact, destination, target, **options):
        export(artifact, destination, target, **options)
        return export(artifact, destination, target, **options)

    monkeypatch.setattr(server, "export", slower)
    assert is_checkpoint(prepare_checkpoint(tiny_artifact))


def test_models_that_cannot_be_exported_are_refused(tiny_base, tmp_path):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base)
    with pytest.raises(RTPurboError, match="nowhere"):
        prepare_checkpoint(artifact, base_model=str(tmp_path / "nowhere"))


def test_the_command_has_the_right_settings(checkpoint):
    assert options_of(checkpoint) == {
        "--model": str(checkpoint),
        "--served-model-name": "name",
        "--dtype": "auto",
        "--max-num-batched-tokens": "512",
        "--tensor-parallel-size": "1",
    }
    settings = ServerSettings(8192, 64, 2, "float32", GIB, ("--port", "80"))
    assert options_of(checkpoint, settings) == {
        "--model": str(checkpoint),
        "--served-model-name": "name",
        "--dtype": "float32",
        "--max-num-batched-tokens": "64",
        "--tensor-parallel-size": "2",
        "--max-model-len": "8192",
        "--kv-cache-memory-bytes": str(GIB),
        "--port": "80",
    }


def test_a_float8_cache_is_ordered_and_counted(checkpoint):
    settings = ServerSettings(kv_cache_dtype="fp8")
    assert options_of(checkpoint, settings)["--kv-cache-dtype"] == "fp8"
    model = served_capacity(checkpoint, ServerSettings(), GPU)
    assert served_capacity(checkpoint, settings, GPU).dense_tokens == 2 * model.dense_tokens


@pytest.mark.parametrize("spelling", ["--served-model-name", "--served_model_name"])
def test_options_of_the_user_are_passed_once(checkpoint, spelling):
    settings = ServerSettings(others=(f"{spelling}=mine", "--port=80"))
    command = server_command(checkpoint, "name", settings, GPU)
    assert "--served-model-name" not in command[:-2]
    assert command[-2:] == [f"{spelling}=mine", "--port=80"]


@pytest.mark.parametrize(("window", "tokens"), [(32, 512), (1024, 1024), (8192, 2048)])
def test_a_step_computes_as_many_tokens_as_the_window_has(checkpoint, window, tokens):
    path = checkpoint / MODEL_CONFIG_FILE
    config = json.loads(path.read_text())
    config[CHECKPOINT_KEY]["attention"]["sliding_window"] = window
    path.write_text(json.dumps(config))
    assert options_of(checkpoint)["--max-num-batched-tokens"] == str(tokens)
    given = ServerSettings(max_num_batched_tokens=tokens)
    assert served_capacity(checkpoint, ServerSettings(), GPU) == served_capacity(
        checkpoint, given, GPU
    )


def test_without_a_gpu_the_cache_has_a_size(checkpoint, monkeypatch):
    size = "--kv-cache-memory-bytes"
    assert options_of(checkpoint, installation=CPU)[size] == str(CPU_CACHE_BYTES)
    assert size not in options_of(checkpoint, installation=GPU)
    others = ("--gpu-memory-utilization", "0.5")
    assert size not in options_of(checkpoint, ServerSettings(others=others), CPU)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert options_of(checkpoint, installation=CPU)[size] == str(2 * GIB)
    assert options_of(checkpoint, ServerSettings(cache_bytes=GIB), CPU)[size] == str(GIB)


def test_capacity_is_that_of_the_settings(checkpoint):
    settings = ServerSettings(max_num_batched_tokens=64, max_model_len=512, cache_bytes=3 * GIB)
    on_cpu = served_capacity(checkpoint, settings, CPU)
    assert (on_cpu.memory, on_cpu.request_tokens) == (3 * GIB, 512)
    # On a GPU a second batch is under way, and held beside the window.
    assert served_capacity(checkpoint, settings, GPU).tokens < on_cpu.tokens
    assert served_capacity(checkpoint, ServerSettings(), GPU).memory == GIB


def serve(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_serve_replaces_its_process_by_the_server(tiny_artifact, checkpoint, tmp_path):
    stand_in = write_stand_in(tmp_path / "site")
    source = Path(rtpurbo.__file__).parent.parent
    for folder in (checkpoint, tiny_artifact):
        command = [sys.executable, "-m", "rtpurbo", "serve", folder, "--port", "8123", "-tp", "3"]
        finished = subprocess.run(
            [*map(str, command), "--enable-prefix-caching", "--max-model-len", "512"],
            env=os.environ | {"PYTHONPATH": f"{stand_in}{os.pathsep}{source}"},
            capture_output=True,
            text=True,
            check=False,
        )
        # The stand-in's own exit code.
        assert finished.returncode == 3, finished.stderr
        arguments = json.loads(finished.stdout)
        assert is_checkpoint(Path(arguments[arguments.index("--model") + 1]))
        assert arguments[arguments.index("--served-model-name") + 1] == folder.name
        assert arguments[arguments.index("--tensor-parallel-size") + 1] == "3"
        assert arguments[-3:] == ["--port", "8123", "--enable-prefix-caching"]
        assert "in requests of 512," in finished.stderr


def test_the_command_can_be_printed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_stand_in(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    result = serve(checkpoint, "--print-command", "--cache-gib", "0.5", "--chat-template", "a b")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{sys.executable} -m {SERVER_MODULE} --model {checkpoint} ")
    assert f"--kv-cache-memory-bytes {GIB // 2} --chat-template 'a b'" in result.stdout
    assert result.stderr.startswith("0.5 GiB of cache holds ")


def test_serve_without_vllm_is_explained(checkpoint, monkeypatch):
    monkeypatch.setattr("rtpurbo.serving.installation.find_spec", lambda name: None)
    result = serve(checkpoint)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: vLLM is not installed here: install vllm==0.33")


def test_the_command_can_be_printed_without_vllm(checkpoint, monkeypatch):
    monkeypatch.setattr("rtpurbo.serving.installation.find_spec", lambda name: None)
    result = serve(checkpoint, "--print-command", "-tp", "3")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"python3 -m {SERVER_MODULE} --model {checkpoint} ")
    assert "--kv-cache-memory-bytes" not in result.stdout
    assert result.stderr.startswith("1 GiB of cache holds ")
