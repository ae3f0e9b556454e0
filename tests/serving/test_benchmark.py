import json
import sys

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rtpurbo.cli import app
from rtpurbo.errors import RTPurboError
from rtpurbo.serving.benchmark import Load, bench_serve, dense_view
from rtpurbo.serving.export import export
from rtpurbo.serving.installation import Installation
from rtpurbo.serving.server import ServerSettings

# vLLM's server and client, which answer every request.
SERVER = """
import argparse, json, pathlib
from http.server import BaseHTTPRequestHandler, HTTPServer
parser = argparse.ArgumentParser()
parser.add_argument("--model"); parser.add_argument("--port", type=int)
arguments, _ = parser.parse_known_args()
with open(pathlib.Path(__file__).parents[3] / "imports", "a") as file: file.write("server\\n")
sparse = "rtpurbo" in json.loads((pathlib.Path(arguments.model) / "config.json").read_text())
print(f"GPU KV cache size: {15_000 if sparse else 10_000:,} tokens, Maximum concurrency", flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if sparse and self.path == "/metrics":
            self.wfile.write(b"# TYPE rtpurbo:cache_tokens gauge\\nrtpurbo:cache_tokens 20000.0\\n")
HTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()
"""
CLIENT = """
import json, pathlib
with open(pathlib.Path(__file__).parents[2] / "imports", "a") as file: file.write("client\\n")
def add_cli_args(parser):
    for name in ("--ignore-eos", "--save-result"): parser.add_argument(name, action="store_true")
    for name in ("base-url", "model", "tokenizer", "dataset-name", "random-input-len",
                 "random-output-len", "num-prompts", "max-concurrency", "request-rate", "seed",
                 "result-dir", "result-filename"):
        parser.add_argument("--" + name, required=True)
def main(args):
    assert int(args.random_output_len) < 1000, "long answer"
    failed = int(args.random_input_len) > 1000
    result = {"completed": int(args.num_prompts) - failed, "failed": int(failed), "p99_ttft_ms": 4.0,
              "median_ttft_ms": 3.0, "median_tpot_ms": 2.0, "p99_tpot_ms": 2.5, "median_itl_ms": 1.5,
              "output_throughput": 9.0}
    (pathlib.Path(args.result_dir) / args.result_filename).write_text(json.dumps(result))
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A stand-in for vLLM in a folder that subprocesses import from."""
    site = tmp_path / "site" / "vllm"
    for module, source in (("entrypoints/openai/api_server", SERVER), ("benchmarks/serve", CLIENT)):
        path = site / f"{module}.py"
        path.parent.mkdir(parents=True)
        path.write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(site.parent))
    return Installation("0.32.0", on_cpu=True, python=sys.executable)


@pytest.fixture
def checkpoint(tiny_artifact, tmp_path):
    return export(tiny_artifact, tmp_path / "export", "vllm")


def test_records_of_both_models(vllm, checkpoint, tmp_path):
    output, lines, written = tmp_path / "serve.json", [], []

    def log(line):
        lines.append(line)
        written.append(len(json.loads(output.read_text())["records"]) if lines[1:] else 0)

    loads = [Load(64, 8, 1), Load(64, 8, 3, request_rate=2.0)]
    records = bench_serve(checkpoint, ServerSettings(), vllm, loads, output=output, log=log)
    stored = json.loads(output.read_text())
    assert stored["records"] == records
    assert len(lines) == len(records) == 4
    assert [record["policy"] for record in records] == ["full", "full", "rtpurbo", "rtpurbo"]
    assert [record["requests"] for record in records] == [4, 6, 4, 6]
    assert records[3] == {
        "phase": "serve",
        "engine": "vllm",
        "engine_version": "0.32.0",
        "policy": "rtpurbo",
        "context_length": 64,
        "output_tokens": 8,
        "concurrency": 3,
        "request_rate": 2.0,
        "requests": 6,
        "time_to_first_token_ms": 3.0,
        "time_to_first_token_ms_p99": 4.0,
        "time_per_output_token_ms": 2.0,
        "time_per_output_token_ms_p99": 2.5,
        "inter_token_latency_ms": 1.5,
        "output_tokens_per_second": 9.0,
        "cache_tokens": 20_000,
    }
    assert records[0]["cache_tokens"] == 10_000
    # What was measured before is stored.
    assert written == [0, 1, 2, 3]
    # One client, and one server of each policy, for all loads.
    started = (tmp_path / "site" / "imports").read_text().split()
    assert sorted(started) == ["client", "server", "server"]


def test_failed_requests_are_an_error(vllm, checkpoint):
    with pytest.raises(RTPurboError, match="1 of 1 requests of 2,000 tokens failed"):
        bench_serve(checkpoint, ServerSettings(), vllm, [Load(2000, 8, 1)], policies=["full"])


def test_a_client_that_fails(vllm, checkpoint):
    with pytest.raises(RTPurboError, match="client failed: AssertionError: long answer"):
        bench_serve(checkpoint, ServerSettings(), vllm, [Load(64, 1000, 1)], policies=["full"])


def test_a_server_that_does_not_start(vllm, checkpoint):
    settings = ServerSettings(others=("--port",))
    with pytest.raises(RTPurboError, match=r"did not start: .*expected one argument"):
        bench_serve(checkpoint, settings, vllm, [Load(64, 8, 1)])


def test_the_dense_view_is_a_dense_checkpoint(checkpoint, tmp_path):
    dense = dense_view(checkpoint, tmp_path / "dense")
    _, loading = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    index = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(index.values()):
        with safe_open(dense / name, framework="pt") as file:
            assert not [key for key in file.keys() if "indexer" in key]  # noqa: SIM118
    assert json.loads((dense / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_command(vllm, checkpoint, monkeypatch):
    monkeypatch.setattr("rtpurbo.serving.installation.find_vllm", lambda: vllm)
    command = ["bench", "serve", str(checkpoint), "--length", "64", "--concurrency", "2"]
    result = CliRunner().invoke(app, [*command, "--policy", "rtpurbo", "--enforce-eager"])
    assert result.exit_code == 0, result.stderr
    assert "2 x 64 tokens: first token 3 ms" in result.stderr
    assert "3 (4)" in result.stdout
    assert "20,000" in result.stdout
