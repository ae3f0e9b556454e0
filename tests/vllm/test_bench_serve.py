"""`rtpurbo bench serve` with vLLM's own server and benchmark client."""

import os
import subprocess
import sys

import pytest

from rtpurbo import strict_json
from tests.vllm.checkpoints import save_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("has_text", [False, True])
def test_dense_and_sparse_in_one_run(has_text, tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    output = tmp_path / "serve.json"
    command = [sys.executable, "-m", "rtpurbo", "bench", "serve", checkpoint, "-o", output]
    command += ["--length", 200, "--output-tokens", 8, "--concurrency", 1, "--concurrency", 3]
    command += ["--requests", 4, "--request-rate", 20, "--enforce-eager", "--dtype", "float32"]
    if has_text:
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(f"Paragraph {number} has few words." for number in range(4000)))
        command += ["--data", text]
    environment = {key: value for key, value in os.environ.items() if "MULTIPROCESSING" not in key}
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    records = strict_json.read(output)["records"]
    assert [(record["policy"], record["concurrency"]) for record in records] == [
        ("full", 1),
        ("full", 3),
        ("rtpurbo", 1),
        ("rtpurbo", 3),
    ]
    for record in records:
        assert record["engine_version"].startswith("0.3")
        assert 0 < record["time_to_first_token_ms"] <= record["time_to_first_token_ms_p99"]
        assert 0 < record["time_per_output_token_ms"] <= record["time_per_output_token_ms_p99"]
        assert record["inter_token_latency_ms"] > 0
        assert record["output_tokens_per_second"] > 0
    assert records[2]["cache_tokens"] > records[0]["cache_tokens"] > 0
