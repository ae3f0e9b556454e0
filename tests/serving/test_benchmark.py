import json
import sys
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rtpurbo.cli import app
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.serving.benchmark import Load, bench_serve, dense_view, text_of
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
    for name in ("--ignore-eos", "--save-result", "--skip-chat-template", "--disable-shuffle"):
        parser.add_argument(name, action="store_true")
    for name in ("base-url", "model", "tokenizer", "dataset-name", "num-prompts", "max-concurrency",
                 "request-rate", "seed", "result-dir", "result-filename"):
        parser.add_argument("--" + name, required=True)
    for name in ("random-input-len", "random-output-len", "custom-output-len"):
        parser.add_argument("--" + name, default=0)
    parser.add_argument("--dataset-path", default="")
def main(args):
    assert int(args.random_output_len) < 1000, "long answer"
    if args.dataset_name == "custom":
        assert args.skip_chat_template and args.disable_shuffle
        lines = pathlib.Path(args.dataset_path).read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert len(set(prompts)) == int(args.num_prompts)
        with open(pathlib.Path(__file__).parents[2] / "prompts", "a") as file:
            file.write(json.dumps([args.custom_output_len, prompts]) + "\\n")
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


def test_prompts_of_text(vllm, checkpoint, tmp_path):
    text = " ".join(f"Word {number} of many." for number in range(2000))
    corpus = TextCorpus("some text", (text,))
    output, loads = tmp_path / "serve.json", [Load(64, 8, 1), Load(64, 8, 3, requests=5)]
    bench_serve(checkpoint, ServerSettings(), vllm, loads, corpus=corpus, output=output)
    lines = (tmp_path / "site" / "prompts").read_text().splitlines()
    sent = [json.loads(line) for line in lines]
    assert [(answer, len(prompts)) for answer, prompts in sent] == 2 * [
        ("4", 1),
        ("8", 4),
        ("8", 5),
    ]
    # Both models get the same prompts, and each load other ones.
    assert sent[:3] == sent[3:]
    assert not set(sent[1][1]) & set(sent[2][1])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for _, prompts in sent:
        for prompt in prompts:
            assert prompt in text
            assert 60 <= len(tokenizer(prompt).input_ids) <= 64
    assert json.loads(output.read_text())["notes"] == ["Prompts: some text."]


def test_too_short_a_text_is_refused_before_a_server_starts(vllm, checkpoint, tmp_path):
    corpus = TextCorpus("a word", ("word",))
    with pytest.raises(RTPurboError, match="'a word' has only"):
        bench_serve(checkpoint, ServerSettings(), vllm, [Load(64, 8, 1)], corpus=corpus)
    imports = tmp_path / "site" / "imports"
    assert not imports.exists() or "server" not in imports.read_text()


def test_a_text_that_would_be_encoded_as_more_tokens_loses_its_end(checkpoint):
    class Splitting:
        """Encodes every text as two more tokens than it was decoded from."""

        def decode(self, token_ids, skip_special_tokens):
            assert skip_special_tokens
            return " ".join(map(str, token_ids))

        def __call__(self, text):
            return SimpleNamespace(input_ids=[0, 0, *text.split()])

    assert text_of(list(range(10)), Splitting()) == "0 1 2 3 4 5 6 7"


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


def test_command(vllm, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("rtpurbo.serving.installation.find_vllm", lambda: vllm)
    command = ["bench", "serve", str(checkpoint), "--length", "64", "--concurrency", "2"]
    result = CliRunner().invoke(app, [*command, "--policy", "rtpurbo", "--enforce-eager"])
    assert result.exit_code == 0, result.stderr
    assert "2 x 64 tokens: first token 3 ms" in result.stderr
    assert not (tmp_path / "site" / "prompts").exists()
    assert "3 (4)" in result.stdout
    assert "20,000" in result.stdout
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {number} has a few words." for number in range(2000)))
    result = CliRunner().invoke(app, [*command, "--policy", "rtpurbo", "--data", str(text)])
    assert result.exit_code == 0, result.stderr
    assert "Paragraph" in (tmp_path / "site" / "prompts").read_text()
