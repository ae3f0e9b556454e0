"""Times vLLM's engine with a sparse model of random weights against the dense model on stock vLLM, without a server.

`python experiments/engine_speed.py --load 4096x1 --load 131072x1 --output benchmarks/results/serve-h200.json`

A load is PROMPTxBATCH: so many requests at once, of so many prompt tokens each. The model has the sizes of Qwen3-8B,
and `--retrieval-ratio` of its heads retrieve. Each engine runs in a process of its own, one after the other, with full
CUDA graphs of decode steps or, with `--mode compiled`, as vLLM runs by default. Decode selects a fixed share of the
keys (`--density`), since random weights have no mass to follow; so each length beyond the window has a sparse engine of
its own. A load that does not fit in the cache is noted and left out. `--profile` writes tables of the sparse model's
kernels, in decode steps and in the last chunk of a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.benchmarks.decode import forced
from rtpurbo.benchmarks.geometries import GEOMETRIES, spread_head_map
from rtpurbo.config import AttentionRule, IndexerSettings, RTPurboConfig
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact_config import CHECKPOINT_KEY, FORMAT_VERSION
from rtpurbo.serving.benchmark import POLICIES
from rtpurbo.serving.vllm.checkpoint import PROMPT_LENGTHS_KEY
from rtpurbo.serving.vllm.plugin import PREFIX
from rtpurbo.version import library_commit

GEOMETRY = "qwen3-8b"
RECORD = "RECORD "
"""Prefix of a record in the output of an engine's process."""
CAPTURED = [1, 2, 4, 8, 16]
MODES: dict[str, dict[str, Any]] = {
    "graphs": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": CAPTURED,
    },
    "compiled": {"cudagraph_capture_sizes": CAPTURED},
}
# Requests need room for their answers, and the engine for one more step.
SPARE_TOKENS = 256


@dataclass(frozen=True)
class EngineLoad:
    """Requests that are sent at once.

    Attributes:
        context_length: prompt tokens of each.
        batch: number of requests.
    """

    context_length: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> EngineLoad:
        """Reads PROMPTxBATCH."""
        length, _, batch = text.partition("x")
        return cls(int(length), int(batch or 1))


def write_config(folder: Path, policy: str, settings: argparse.Namespace) -> None:
    """Writes the config.json of the dense or of the sparse model; the weights are drawn by the engine."""
    model_type, sizes = GEOMETRIES[GEOMETRY]
    if settings.layers:
        sizes = sizes | {"num_hidden_layers": settings.layers}
    config = CONFIG_MAPPING[model_type](
        **sizes,
        max_position_embeddings=settings.context + settings.new_tokens + SPARE_TOKENS,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    if policy == "rtpurbo":
        rule = AttentionRule(sliding_window=settings.window)
        longest = max(load.context_length for load in settings.load)
        rule = forced(rule, settings.density, longest, "token")
        sparse = RTPurboConfig(
            spread_head_map(config, settings.retrieval_ratio),
            rule,
            IndexerSettings(16, "low_frequency", float(settings.context)),
        )
        path = folder / "config.json"
        entry = json.loads(path.read_text(encoding="utf-8"))
        entry["architectures"] = [PREFIX + entry["architectures"][0]]
        entry[PROMPT_LENGTHS_KEY] = 1
        entry[CHECKPOINT_KEY] = {**sparse.to_dict(), "format_version": FORMAT_VERSION}
        write_json_atomically(path, entry)


def draw_weights(model: torch.nn.Module) -> None:
    """Random weights in place of vLLM's, which are so small that all index scores would be alike."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            deviation = weight.shape[-1] ** -0.5 if ".indexer." in name else 0.02
            weight.data.normal_(0.0, deviation, generator=generator)
        else:
            weight.data.fill_(1.0 if "norm" in name else 0.0)


class TimedEngine:
    """An engine in this process, and the loads that it runs."""

    def __init__(self, folder: Path, settings: argparse.Namespace) -> None:
        from vllm import LLM

        self.settings = settings
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=settings.context + settings.new_tokens + SPARE_TOKENS,
            max_num_batched_tokens=settings.chunk,
            max_num_seqs=CAPTURED[-1],
            gpu_memory_utilization=settings.memory,
            enable_prefix_caching=False,
            seed=0,
            compilation_config=MODES[settings.mode],
        )
        self.llm.apply_model(draw_weights)
        self.random = random.Random(0)
        self.sent = 0

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit in the cache."""
        return int(self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)

    def new_tokens(self, load: EngineLoad) -> int:
        """Answer tokens of each request, so many that all requests decode together in the end."""
        chunks = -(-load.context_length // self.settings.chunk)
        return self.settings.new_tokens + (load.batch - 1) * (chunks + 1)

    def fits(self, load: EngineLoad) -> bool:
        """Returns True if all requests fit in the cache at once."""
        return load.batch * (load.context_length + self.new_tokens(load)) <= self.cache_tokens

    def send(self, load: EngineLoad, new_tokens: int) -> None:
        """Adds the requests of a load."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for _ in range(load.batch):
            prompt = [self.random.randrange(3, 150_000) for _ in range(load.context_length)]
            self.sent += 1
            self.llm.llm_engine.add_request(
                str(self.sent), {"prompt_token_ids": prompt}, parameters
            )

    def steps(self) -> tuple[list[float], list[float]]:
        """Runs all requests.

        Returns:
            Seconds from now to the first token of each request, and of each step in which all of them decode.
        """
        engine, begin = self.llm.llm_engine, time.perf_counter()
        first: dict[str, float] = {}
        steps: list[float] = []
        last = None
        batch = engine.get_num_unfinished_requests()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now - begin)
            if len(outputs) == batch:
                if last is not None:
                    steps.append(now - last)
                last = now
        return sorted(first.values()), sorted(steps)

    def record(self, policy: str, load: EngineLoad) -> dict[str, Any]:
        """Measures a load."""
        new_tokens = self.new_tokens(load)
        self.send(load, new_tokens)
        first, steps = self.steps()
        milliseconds = 1000 * steps[len(steps) // 2]
        return {
            "phase": "serve",
            "engine": "vllm",
            "engine_version": version("vllm"),
            "policy": policy,
            "context_length": load.context_length,
            "output_tokens": new_tokens,
            "concurrency": load.batch,
            "time_to_first_token_ms": 1000 * first[len(first) // 2],
            "last_first_token_ms": 1000 * first[-1],
            "time_per_output_token_ms": milliseconds,
            "time_per_output_token_ms_p99": 1000 * steps[int(0.99 * (len(steps) - 1))],
            "output_tokens_per_second": 1000 * load.batch / milliseconds,
            "cache_tokens": self.cache_tokens,
            "chunk_tokens": self.settings.chunk,
        }

    def profile(self, load: EngineLoad) -> str:
        """Tables of kernels by time, of the last chunk of the prompts and of eight decode steps."""
        from torch.profiler import ProfilerActivity, profile

        engine, found = self.llm.llm_engine, []
        self.send(load, self.new_tokens(load))
        chunks = -(-load.context_length // self.settings.chunk) * load.batch
        for title, skipped, count in (("last chunks", chunks - 2, 1), ("decode steps", 8, 8)):
            for _ in range(skipped):
                engine.step()
            torch.accelerator.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                begin = time.perf_counter()
                for _ in range(count):
                    engine.step()
                torch.accelerator.synchronize()
                elapsed = time.perf_counter() - begin
            found.append(_kernel_table(f"{load}, {title}", profiler, count, elapsed))
        self.steps()
        return "\n".join(found)


def _kernel_table(title: str, profiler: Any, steps: int, seconds: float) -> str:
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    lines = [
        f"{title}: {seconds / steps * 1e3:.2f} ms a step, {total / steps / 1e3:.2f} ms in kernels"
    ]
    lines += [
        f"{row.device_time_total / steps:10.1f} us {row.count / steps:7.1f} x  {row.key[:100]}"
        for row in rows[:25]
    ]
    return "\n".join([*lines, ""])


def run_engine(policy: str, settings: argparse.Namespace) -> None:
    """Measures all loads with one model in this process, once a line arrives on standard input."""
    import vllm  # noqa: F401  imported while another engine may still be measured

    sys.stdin.readline()
    begin = time.perf_counter()
    with TemporaryDirectory() as name:
        write_config(Path(name), policy, settings)
        engine = TimedEngine(Path(name), settings)
        print(f"{policy}: started in {time.perf_counter() - begin:.1f} s", flush=True)
        # Compiles what is left; later lengths run the same kernels.
        engine.send(EngineLoad(min(2 * settings.chunk + 100, settings.context), 1), 4)
        engine.steps()
        for load in settings.load:
            if not engine.fits(load):
                note = f"{policy}: {load.batch} requests of {load.context_length:,} tokens do not fit in the cache."
                print(RECORD + json.dumps({"note": note}), flush=True)
                continue
            print(RECORD + json.dumps(engine.record(policy, load)), flush=True)
        if settings.profile is not None and policy != "full":
            for load in settings.load:
                if load in (settings.profile_load or settings.load) and engine.fits(load):
                    with settings.profile.open("a", encoding="utf-8") as file:
                        file.write(f"{policy}, {engine.profile(load)}\n")
    # vLLM's shutdown can take minutes.
    os._exit(0)


def engines(settings: argparse.Namespace) -> list[tuple[str, list[EngineLoad]]]:
    """Policies with the loads of each engine: all of them if nothing is selected."""
    loads = sorted(settings.load, key=lambda load: (load.context_length, load.batch))
    within = [load for load in loads if load.context_length <= settings.window]
    beyond = [load for load in loads if load.context_length > settings.window]
    by_length = [list(group) for _, group in groupby(beyond, lambda load: load.context_length)]
    if by_length:
        by_length[0] = within + by_length[0]
    found = []
    for policy in settings.policies.split(","):
        groups = by_length if policy == "rtpurbo" and by_length else [loads]
        found += [(policy, group) for group in groups]
    return found


def measure(arguments: list[str], settings: argparse.Namespace) -> None:
    """Runs the engines one after the other, and writes the file after every record."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    processes = []
    for policy, loads in engines(settings):
        chosen = [
            part for load in loads for part in ("--load", f"{load.context_length}x{load.batch}")
        ]
        command = [
            sys.executable, __file__, *_without_loads(arguments), *chosen,
            "--context", str(settings.context), "--engine", policy,
        ]  # fmt: skip
        processes.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        )
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__.partition("+")[0],
        "transformers": version("transformers"),
        "commit": library_commit(),
        "command": shlex.join(["python", "experiments/engine_speed.py", *arguments]),
        "model": f"{GEOMETRY}'s shape, random weights",
        "notes": [
            f"{settings.retrieval_ratio:.0%} of the heads retrieve, window of {settings.window:,}, "
            f"{settings.density:.0%} of the keys selected by force, mode {settings.mode}."
        ],
        "records": [],
    }
    try:
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("start\n")
            process.stdin.close()
            for line in process.stdout:
                if not line.startswith(RECORD):
                    print(line, end="", flush=True)
                    continue
                found = json.loads(line.removeprefix(RECORD))
                print(found, flush=True)
                if "note" in found:
                    results["notes"].append(found["note"])
                else:
                    results["records"].append(found)
                write_json_atomically(settings.output, results)
            if process.wait():
                raise SystemExit(f"an engine ended with the exit code {process.returncode}.")
    finally:
        for process in processes:
            process.kill()


def _without_loads(arguments: list[str]) -> list[str]:
    """The command line without `--load` and its values."""
    kept = iter(arguments)
    found = []
    for argument in kept:
        if argument == "--load":
            next(kept)
        elif not argument.startswith("--load="):
            found.append(argument)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=EngineLoad.parse, action="append", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--profile-load", type=EngineLoad.parse, action="append")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--mode", choices=MODES, default="graphs")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--retrieval-ratio", type=float, default=0.15)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--memory", type=float, default=0.9)
    parser.add_argument("--context", type=int, help="longest prompt; that of the loads by default")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    settings.context = settings.context or max(load.context_length for load in settings.load)
    return settings


def main() -> None:
    """Runs the experiment, or one engine of it."""
    arguments = sys.argv[1:]
    settings = parse(arguments)
    if settings.engine:
        run_engine(settings.engine, settings)
    else:
        measure(arguments, settings)


if __name__ == "__main__":
    main()
