"""Times sparse models of four decoder shapes with random weights against the same models with dense attention.

`python experiments/decoder_shapes.py --output benchmarks/results/decoder-shapes-h200.json`

Every shape has the sizes of a published model and few layers. Half of the KV heads of each full-attention layer are
kept whole, with all their query heads as retrieval heads. A prompt and decode steps over its cache are timed, first
dense, then sparse; the note of a record names the backend of the sparse attention, and the reason where it is PyTorch.
Decode selects a fixed share of the keys (`--density`), since random weights have no mass to follow. Decode steps
run twice: as the library runs them, and without CUDA graphs, as transformers runs the dense model. The file is
written after every record.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.benchmarks.decode import SELECTION_TOLERANCE, forced
from rtpurbo.benchmarks.geometries import draw_indexers
from rtpurbo.benchmarks.layer import dtype_name
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.timing import Call
from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.errors import first_line
from rtpurbo.models.architecture import convertible_shapes
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.models.sparsify import sparsify
from rtpurbo.speed_records import SpeedResults, stated_density, write_speed

# The window of a conversion is an eighth of the context, after these many sinks on a GPU.
NUM_SINKS = 128


def _rope(theta: float, partial_rotary_factor: float, **others: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, **others}
    return {"rope_parameters": {**rope, "partial_rotary_factor": partial_rotary_factor}}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5-9B": ("qwen3_5_text", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        **_rope(1e7, 0.25, mrope_section=[11, 11, 10], mrope_interleaved=True),
    }),
    "gpt-oss-20b": ("gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "num_local_experts": 32, "num_experts_per_tok": 4,
    }),
    "GLM-4.5-Air": ("glm4_moe", {
        "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 3,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "attention_bias": True, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, **_rope(1e6, 0.5),
    }),
    "Gemma 4 31B": ("gemma4_text", {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 6,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256,
        "global_head_dim": 512, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
        "sliding_window": 1024, "hidden_size_per_layer_input": 0,
    }),
}  # fmt: skip
"""Model type in transformers and configuration, by name."""


def build_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Builds the dense model of a shape with random weights."""
    kind, sizes = SHAPES[name]
    config = CONFIG_MAPPING[kind](**{"max_position_embeddings": 131072, **sizes})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def half_of_kv_heads(config: Any) -> HeadMap:
    """Returns a head map whose retrieval heads are those of every second KV head."""
    retrieval, heads, kv_heads = ([None] * config.num_hidden_layers for _ in range(3))
    for layer, shape in convertible_shapes(config).items():
        heads[layer], kv_heads[layer] = shape.num_attention_heads, shape.num_key_value_heads
        group = heads[layer] // kv_heads[layer]
        retrieval[layer] = tuple(head for head in range(heads[layer]) if head // group % 2 == 0)
    return HeadMap(*(tuple(each) for each in (retrieval, heads, kv_heads)))


@dataclass
class Case:
    """One shape to measure: its model, dense at first, the tokens of its prompt, and its attention rule."""

    name: str
    model: PreTrainedModel
    length: int
    rule: AttentionRule

    def __post_init__(self) -> None:
        self.head_map = half_of_kv_heads(self.model.config)
        self.note = ""

    def tokens(self, count: int) -> torch.Tensor:
        """Random tokens, int64 [1, count]."""
        return torch.randint(self.model.config.vocab_size, (1, count), device=self.model.device)

    def prompt(self) -> Call:
        """Returns a call that runs a prompt and returns the model's output."""
        tokens = self.tokens(self.length)
        return lambda: self.model(tokens, use_cache=True, logits_to_keep=1)

    def steps(self, room: int) -> Call:
        """Returns a call that runs one decode step over the cache of a prompt, with room for `room` steps."""
        cache, token = getattr(self.prompt()(), CACHE_NAME), self.tokens(1)
        if isinstance(cache, HeadwiseCache):
            cache.expected_length = self.length + room

        def step() -> Any:
            output = self.model(token, use_cache=True, **{CACHE_NAME: cache})
            is_static = getattr(cache, "is_static", False)
            self.note = "CUDA graph" if is_static else "no CUDA graph"
            return output

        return step

    def entry(self, phase: str, name: str, prepare: Callable[[], Call], density: float) -> Entry:
        """Returns an entry whose note names the backend of the attention, if the model is sparse."""
        shape = next(iter(convertible_shapes(self.model.config).values()))
        # `model_facts` reads numbers of heads that differ between the layers of some models.
        facts = {
            "phase": phase, "context_length": self.length, "batch_size": 1, **vars(shape),
            "num_retrieval_heads": self.head_map.num_retrieval_heads,
            "sliding_window": self.rule.sliding_window, "retrieval_window": self.rule.near_window,
            "density": round(density, 4), "dtype": dtype_name(self.model.dtype),
            "model": f"{self.name}, {self.model.config.num_hidden_layers} layers",
        }  # fmt: skip
        entry = Entry(name, {"": prepare}, facts, is_ours=is_sparse(self.model), growth=1)

        def check(call: Call) -> str | None:
            self.note = ""
            is_finite = bool(call().logits.isfinite().all())
            backend = self.backend() if entry.is_ours else ""
            entry.note = "; ".join(filter(None, [self.note, backend]))
            return None if is_finite else "the logits are not finite"

        entry.check = check
        return entry

    def backend(self) -> str:
        """Returns the backend of the last forward, and the reason where it is not that of the kernels."""
        layers = headwise_modules(self.model)
        if {layer.used_backend for layer in layers} == {"triton"}:
            return "attention on Triton kernels"
        for layer in layers:
            layer.backend = "triton"
        try:
            self.model(self.tokens(2), use_cache=False)
        except ValueError as error:
            return f"attention on PyTorch operators ({first_line(error)})"
        finally:
            for layer in layers:
                layer.backend = "auto"
        return "attention on PyTorch operators, where kernels support a short prompt"


def bench_shape(session: Session, case: Case, density: float) -> None:
    """Measures a prompt and decode steps of one shape, dense and sparse."""
    model, room = case.model, 2 * session.repeats + 16
    own = model.config._attn_implementation
    if own == "eager" and session.device.type == "cuda":
        # Eager attention would materialise the logits of the whole prompt.
        model.set_attn_implementation("flex_attention")
    name = model.config._attn_implementation
    session.run(case.entry("model-prefill", name, case.prompt, 1.0))

    def dense_steps() -> Call:
        step = case.steps(room)
        model.set_attn_implementation(own)
        return step

    session.run(case.entry("model-decode", own, dense_steps, 1.0))
    model.set_attn_implementation(own)
    sparsify(model, RTPurboConfig(case.head_map, case.rule))
    draw_indexers(model)
    session.run(case.entry("model-prefill", "rtpurbo-dense-retrieval", case.prompt, 1.0))
    model.rtpurbo.set_rule(**vars(forced(case.rule, density, case.length, "block")))
    with model.rtpurbo.counting() as statistics:
        case.steps(room)()
    far = 1 - (case.rule.near_window + NUM_SINKS) / case.length
    selected = stated_density(density, far * (statistics.share_read or 0.0), SELECTION_TOLERANCE)
    for name, graphs in (("rtpurbo", True), ("rtpurbo-no-graph", False)):
        model.rtpurbo_graphs = graphs
        session.run(case.entry("model-decode", name, partial(case.steps, room), selected))


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=f"of: {', '.join(SHAPES)}; default: all")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps")
    parser.add_argument("--density", type=float, default=0.1, help="keys that decode steps select")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    device, command = resolve_device(arguments.device), shlex.join(["python", *sys.argv])

    def write(results: SpeedResults) -> None:
        write_speed(arguments.output, device_name(device), command, results)

    session = Session(device, arguments.steps, log=partial(print, flush=True), on_record=write)
    session.results.notes.append(f"transformers {version('transformers')}.")
    rule = AttentionRule(num_sink_tokens=NUM_SINKS, sliding_window=arguments.length // 8)
    for name in arguments.shapes or SHAPES:
        try:
            model = build_model(name, getattr(torch, arguments.dtype), device)
            with torch.no_grad():
                bench_shape(session, Case(name, model, arguments.length, rule), arguments.density)
        except Exception as error:  # the other shapes are measured nevertheless
            session.results.errors.append(f"{name}: {first_line(error, with_type=True)}.")
            session.log(session.results.errors[-1])
        model = None
        release(device)
        write(session.results)


if __name__ == "__main__":
    main()
