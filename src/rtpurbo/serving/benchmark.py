"""Benchmark of vLLM's server under load, dense and sparse, with vLLM's own client."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, draw_passages
from rtpurbo.devices import device_name
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact_config import CHECKPOINT_KEY, INDEXER_FILE, MODEL_CONFIG_FILE
from rtpurbo.serving.export import SHARD_INDEX_FILE
from rtpurbo.serving.installation import Installation
from rtpurbo.serving.server import ServerSettings, server_command
from rtpurbo.serving.vllm.checkpoint import PROMPT_LENGTHS_KEY
from rtpurbo.serving.vllm.plugin import PREFIX
from rtpurbo.version import library_commit

POLICIES = ("full", "rtpurbo")
"""The dense model on stock vLLM, and the sparse model."""

START_SECONDS = 900
"""Longest start of a server; compilation takes minutes on a CPU."""

_NAME = "model"
_DONE = "RTPURBO-DONE"
# `vllm bench serve`, also where the distribution has another name. Its imports take longer than many loads, so one
# process runs all of them: it reads a command line as JSON per line.
_CLIENT = f"""
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print("\\n{_DONE}", flush=True)
"""


@dataclass(frozen=True)
class Load:
    """Requests of one length.

    Attributes:
        context_length: prompt tokens of a request.
        output_tokens: answer tokens of a request.
        concurrency: largest number of requests at a time.
        request_rate: mean arrivals per second of a Poisson process; None sends a request as soon as
            another one ends.
        requests: number of requests; None for two rounds of `concurrency`, at least four.
    """

    context_length: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    requests: int | None = None

    @property
    def num_requests(self) -> int:
        """Number of requests, also where `requests` is None."""
        return self.requests or max(4, 2 * self.concurrency)


def bench_serve(
    checkpoint: Path,
    settings: ServerSettings,
    installation: Installation,
    loads: Sequence[Load],
    *,
    policies: Iterable[str] = POLICIES,
    corpus: TextCorpus | None = None,
    command: str = "",
    output: Path | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measures a server under each load, the dense model first.

    Args:
        checkpoint: folder of an export for vLLM.
        settings: options of both servers.
        installation: vLLM that runs them.
        loads: loads to measure.
        policies: subset of `POLICIES`.
        corpus: text whose passages are the prompts; None for random tokens, in which the index selects other shares of
            the keys than in text.
        command: command line to record.
        output: JSON file, written after every measurement.
        log: receives a line per measurement.

    Returns:
        A record per policy and load; times are in milliseconds. With several requests at a time, the time per
        output token contains prompts of other requests, and the median of `inter_token_latency_ms` is a decode step.

    Raises:
        RTPurboError: a server does not start, a request fails, or the text is too short.
    """
    tokenizer = None if corpus is None else AutoTokenizer.from_pretrained(checkpoint)
    records: list[dict[str, Any]] = []
    device = device_name(torch.device("cpu" if installation.on_cpu else "cuda"))
    with TemporaryDirectory() as name, _running_client(installation, Path(name)) as client:
        folder = Path(name)

        def prompts_of(load: Load, seed: int) -> dict[str, object]:
            if corpus is None:
                return random_prompts(load, seed)
            return text_prompts(load, seed, corpus, tokenizer, folder)

        # Drawn before a server starts, because a text may be too short, and once for both models.
        prompts = [prompts_of(load, seed) for seed, load in enumerate(loads)]
        # Kernels are compiled for a length.
        warm_ups: dict[int, tuple[Load, dict[str, object]]] = {}
        for seed, load in enumerate(loads, start=len(loads)):
            if load.context_length not in warm_ups:
                once = Load(load.context_length, 4, 1, requests=1)
                warm_ups[load.context_length] = once, prompts_of(once, seed)
        for policy in policies:
            served = checkpoint if policy == "rtpurbo" else dense_view(checkpoint, folder / "dense")
            with running_server(served, settings, installation, folder / policy) as server:
                cold = dict(warm_ups)
                for load, chosen in zip(loads, prompts, strict=True):
                    if load.context_length in cold:
                        server.run(client, *cold.pop(load.context_length))
                    found = {
                        "phase": "serve",
                        "engine": "vllm",
                        "engine_version": installation.version,
                        "policy": policy,
                        **server.run(client, load, chosen),
                        "cache_tokens": server.cache_tokens(),
                    }
                    records.append(found)
                    log(describe(found))
                    if output is not None:
                        facts: dict[str, Any] = {
                            "device": device,
                            "torch": torch.__version__,
                            "commit": library_commit(),
                            "command": command,
                            "model": checkpoint.name,
                            "notes": [] if corpus is None else [f"Prompts: {corpus.name}."],
                        }
                        write_json_atomically(output, {**facts, "records": records})
    return records


def describe(record: dict[str, Any]) -> str:
    """Returns a record as a line of text."""
    return (
        f"{record['policy']}: {record['concurrency']} x {record['context_length']:,} tokens: "
        f"first token {record['time_to_first_token_ms']:.0f} ms, "
        f"{record['time_per_output_token_ms']:.2f} ms per output token, "
        f"{record['output_tokens_per_second']:.1f} output tokens/s"
    )


def random_prompts(load: Load, seed: int) -> dict[str, object]:
    """Returns the client's options for prompts of random tokens, which differ between seeds."""
    return {
        "dataset-name": "random",
        "random-input-len": load.context_length,
        "random-output-len": load.output_tokens,
        "seed": seed,
    }


def text_prompts(
    load: Load, seed: int, corpus: TextCorpus, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, object]:
    """Writes passages of a corpus to a file in `folder`, and returns the client's options for them as prompts.

    Raises:
        RTPurboError: the corpus has too few different passages of the load's length.
    """
    generator = random.Random(seed)
    length = load.context_length
    passages = draw_passages(tokenizer, corpus, length, load.num_requests, generator)
    path = folder / f"prompts-{seed}.jsonl"
    lines = [json.dumps({"prompt": text_of(passage, tokenizer)}) for passage in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "dataset-name": "custom",
        "dataset-path": path,
        "custom-output-len": load.output_tokens,
        "skip-chat-template": None,
        "disable-shuffle": None,
        "seed": seed,
    }


def text_of(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of tokens, without the last ones if it would be encoded as more tokens."""
    most = len(token_ids)
    while True:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
        if (excess := len(tokenizer(text).input_ids) - most) <= 0:
            return text
        token_ids = token_ids[:-excess]


def dense_view(checkpoint: Path, folder: Path) -> Path:
    """Makes a folder with the dense model of an export, out of links to its weights.

    Args:
        checkpoint: folder of an export for vLLM.
        folder: folder to create.

    Returns:
        `folder`.
    """
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in (MODEL_CONFIG_FILE, INDEXER_FILE, SHARD_INDEX_FILE):
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / MODEL_CONFIG_FILE).read_text(encoding="utf-8"))
    for entry in (CHECKPOINT_KEY, PROMPT_LENGTHS_KEY):
        del config[entry]
    config["architectures"] = [name.removeprefix(PREFIX) for name in config["architectures"]]
    write_json_atomically(folder / MODEL_CONFIG_FILE, config)
    index = json.loads((checkpoint / SHARD_INDEX_FILE).read_text(encoding="utf-8"))
    index["weight_map"] = {
        tensor: file for tensor, file in index["weight_map"].items() if file != INDEXER_FILE
    }
    write_json_atomically(folder / SHARD_INDEX_FILE, index)
    return folder


@dataclass(frozen=True)
class _Client:
    requests: IO[str]
    output: IO[str]
    folder: Path

    def run(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Runs vLLM's client with these options and returns its result."""
        arguments = ["--ignore-eos", "--save-result"]
        result = {"result-dir": self.folder, "result-filename": "result.json"}
        for option, value in {**options, **result}.items():
            # An option without a value is a flag.
            arguments += [f"--{option}"] if value is None else [f"--{option}", str(value)]
        # A client that has ended is reported below.
        with suppress(BrokenPipeError):
            print(json.dumps(arguments), file=self.requests, flush=True)
        if _DONE not in (line.strip() for line in self.output):
            log = (self.folder / "client.log").read_text(encoding="utf-8", errors="replace")
            raise RTPurboError(f"vLLM's benchmark client failed: {_last_line(log)}")
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text("utf-8"))
        return found


@contextmanager
def _running_client(installation: Installation, folder: Path) -> Iterator[_Client]:
    command = [installation.python, "-c", _CLIENT]
    with (folder / "client.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield _Client(process.stdin, process.stdout, folder)
        finally:
            process.kill()


@dataclass(frozen=True)
class _Server:
    address: str
    checkpoint: Path
    folder: Path

    def run(self, client: _Client, load: Load, prompts: Mapping[str, object]) -> dict[str, Any]:
        """Sends the requests of a load; `prompts` are the client's options for them."""
        requests = load.num_requests
        options = {
            "base-url": self.address,
            "model": _NAME,
            "tokenizer": self.checkpoint,
            **prompts,
            "num-prompts": requests,
            "max-concurrency": load.concurrency,
            "request-rate": load.request_rate or "inf",
        }
        result = client.run(options)
        if result["failed"] or result["completed"] != requests:
            raise RTPurboError(
                f"{requests - result['completed']} of {requests} requests of {load.context_length:,} "
                "tokens failed: lower the length or the concurrency."
            )
        return {
            "context_length": load.context_length,
            "output_tokens": load.output_tokens,
            "concurrency": load.concurrency,
            "request_rate": load.request_rate,
            "requests": requests,
            "time_to_first_token_ms": result["median_ttft_ms"],
            "time_to_first_token_ms_p99": result["p99_ttft_ms"],
            "time_per_output_token_ms": result["median_tpot_ms"],
            "time_per_output_token_ms_p99": result["p99_tpot_ms"],
            "inter_token_latency_ms": result["median_itl_ms"],
            "output_tokens_per_second": result["output_throughput"],
        }

    def cache_tokens(self) -> int | None:
        """Tokens of context that fit in the cache: the gauge of the plugin, or vLLM's log for a dense model.

        For a sparse model, the log may assume that all requests read their prompts at once (`CachePlan.capacity`).
        """
        with urlopen(f"{self.address}/metrics", timeout=60) as response:
            metrics = response.read().decode()
        if gauge := re.search(r"^rtpurbo:cache_tokens(?:{.*})? (\S+)$", metrics, re.MULTILINE):
            return int(float(gauge[1]))
        log = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"KV cache size: ([\d,]+) tokens", log)
        return int(found[1].replace(",", "")) if found else None


@contextmanager
def running_server(
    checkpoint: Path, settings: ServerSettings, installation: Installation, folder: Path
) -> Iterator[_Server]:
    """Context manager of a server on a free local port; its log goes to `folder`."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    local = ("--host", "127.0.0.1", "--port", str(port))
    settings = replace(settings, others=(*settings.others, *local))
    command = server_command(checkpoint, _NAME, settings, installation)
    server = _Server(f"http://127.0.0.1:{port}", checkpoint, folder)
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        _wait(process, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], server: _Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(URLError, ConnectionError), urlopen(server.address + "/health", timeout=5):
            return
        time.sleep(1)
    log = (server.folder / "server.log").read_text(encoding="utf-8", errors="replace")
    raise RTPurboError(f"the server did not start: {_last_line(log)}")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
