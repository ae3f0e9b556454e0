"""Small sparse models of every family, exported for vLLM, and what transformers generates with them."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rtpurbo
from rtpurbo.config import AttentionRule, HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.files import whole_folder
from rtpurbo.models.architecture import convertible_layers
from rtpurbo.models.artifact_config import ArtifactConfig, save_artifact
from rtpurbo.models.base import load_base_model
from rtpurbo.models.sparse_layers import headwise_modules, indexer_weights
from rtpurbo.serving.export import export
from tests.tiny_models import any_model, make_sparse, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

VOCABULARY = 512
CONTEXT = 2048
# Tokens of prompts, and of each answer.
LENGTHS = (10, 70, 200, 333, 600, 17)
NEW = 40
WINDOW, SINKS = 64, 4
# Layers that differ: one without retrieval heads, one with nothing else, and groups that share a KV
# head between a retrieval head and a local one.
LAYERS = ((1, 2, 6), (), (0, 1, 2, 3, 4, 5, 6, 7), (5,))
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
}
# The logits of these models differ by 3e-5 between float32 and float64.
TIE = 1e-4
# An error in the last bit of float32 may round a key to the next float8 value, 6 % away.
FLOAT8_TIE = 5e-3
# As Gemma 3: windows of layers that are not converted, and rotary embeddings by type of layer.
GEMMA3 = {
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
# Learned sinks, and windows of every other layer.
GPT_OSS = {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
# Of which the answers to prompts of more than 94 tokens read some.
HEAVY_HITTERS = {"dense_prompt_queries": 48, "num_sink_tokens": 32, "num_heavy_hitters": 24}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss")


def save_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    layers: Sequence[Sequence[int]] = LAYERS,
    index_space: str = "low_frequency",
    shared_keys: bool = False,
    rule: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Exports a sparse model of random weights that selects few tokens, and returns its folder."""
    if family == "gemma3_text":
        changes = GEMMA3 | changes
    make = tiny_model
    if family == "gpt_oss":
        changes, make = GPT_OSS | changes, any_model
    shape = {**SHAPE, "num_hidden_layers": len(layers), **changes}
    make(family, **shape).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = load_base_model(str(folder / "base"))
    converted = convertible_layers(base.model.config)
    heads = HeadMap(
        tuple(
            tuple(chosen) if is_sparse else None
            for chosen, is_sparse in zip(layers, converted, strict=True)
        ),
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
    )
    attention = {
        "num_sink_tokens": SINKS,
        "sliding_window": WINDOW,
        "min_tokens": 8,
        "top_p": 0.8,
    }
    indexer = IndexerSettings(8, index_space, shared_keys=shared_keys)
    config = RTPurboConfig(heads, AttentionRule(**attention | (rule or {})), indexer)
    model = make_sparse(base.model, config)
    artifact = ArtifactConfig(base.reference, model.rtpurbo_config)
    with whole_folder(folder / "artifact") as new:
        save_artifact(new, artifact, indexer_weights(model))
    return export(folder / "artifact", folder / "export", "vllm")


def change_config(checkpoint: Path, **changes: Any) -> None:
    """Changes entries of config.json under `rtpurbo`; None takes one away."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del config["rtpurbo"][name]
        else:
            config["rtpurbo"][name] = value
    path.write_text(json.dumps(config))


def random_prompts(
    lengths: Sequence[int], vocabulary: int = VOCABULARY, seed: int = 0
) -> list[list[int]]:
    """Token ids of prompts of these lengths."""
    generator = random.Random(seed)
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


@torch.no_grad()
def expected_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers of transformers, one prompt at a time, without stopping early."""
    return [
        _generate(model, prompt, max_new_tokens).sequences[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def assert_same_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    tie: float = TIE,
) -> None:
    """Answers are equal, token for token, up to a place where two tokens are equally likely.

    Sums over a batch are rounded in another order than sums over one row, so of two tokens whose
    log-probabilities differ by less than `tie` either may win. One answer in twenty may have such a
    place, with a warning for each.
    """
    assert len(answers) == len(expected) == len(prompts)
    ties = 0
    for prompt, answer, wanted in zip(prompts, answers, expected, strict=True):
        if answer == wanted:
            continue
        assert len(answer) == len(wanted)
        place = next(place for place, token in enumerate(wanted) if token != answer[place])
        log_probabilities = _generate(model, prompt, place + 1).logits[place][0].log_softmax(-1)
        gap = log_probabilities[wanted[place]] - log_probabilities[answer[place]]
        message = (
            f"a prompt of {len(prompt)} tokens gets token {answer[place]} for {wanted[place]} at "
            f"{place}, which is likelier by {gap:.1e}"
        )
        assert 0 <= gap < tie, message
        warnings.warn(message, stacklevel=2)
        ties += 1
    assert ties <= max(1, len(prompts) / 20)


@torch.no_grad()
def _generate(model: Any, prompt: Sequence[int], max_new_tokens: int) -> Any:
    return model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def load_reference(checkpoint: Path, device: str = "cpu") -> Any:
    """The same checkpoint as a transformers model in float32; on a GPU with Triton kernels, as in the engine."""
    model, _ = rtpurbo.load(checkpoint, device=device)
    if device != "cpu":
        for module in headwise_modules(model):
            module.backend = "triton"
    return model
