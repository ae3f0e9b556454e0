"""Exports with quantised projections: the tokens are those of a model with the same weights, unpacked."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rtpurbo.serving.export import _index_shards
from tests.vllm.checkpoints import (
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import answers, running

pytestmark = pytest.mark.vllm

NEW = 20
GROUP, BLOCK = 32, 128
# Place of each of eight columns in an integer of AWQ.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# Log-probabilities differ by this much between a dtype and float32.
ROUNDING = {torch.float16: 0.3, torch.bfloat16: 1.0}


def float8(weight):
    """Float8 with a scale for each block, as in the FP8 releases of Qwen3."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / 448
    levels = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    unpacked = levels.float() * scales[:, None, :, None]
    stored = {"weight": levels.view(weight.shape), "weight_scale_inv": scales}
    return stored, unpacked.view(weight.shape)


def awq(weight):
    """Four bits with a scale and a zero point for each group of inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    levels = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    unpacked = (levels - zeros[..., None]) * scales.float()[..., None]
    stored = {
        "qweight": packed(levels.flatten(1).T),
        "qzeros": packed(zeros.T),
        "scales": scales.T.contiguous(),
    }
    return stored, unpacked.flatten(1)


def packed(levels):
    """Levels [rows, columns] as integers [rows, columns / 8]."""
    in_order = levels.long().unflatten(1, (-1, 8))[..., AWQ_ORDER]
    words = (in_order << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


FORMATS = {
    "fp8": (
        float8,
        torch.bfloat16,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    ),
    "awq": (
        awq,
        torch.float16,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    ),
}


def quantize(checkpoint, kind):
    """Quantises the projections of an export, and returns their unpacked weights by name."""
    quantized, _, settings = FORMATS[kind]
    path = checkpoint / "model.safetensors"
    tensors, unpacked = load_file(path), {}
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            stored, unpacked[name] = quantized(tensors.pop(name))
            for part, states in stored.items():
                tensors[name.removesuffix("weight") + part] = states
    save_file(tensors, path, metadata={"format": "pt"})
    _index_shards(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = settings
    (checkpoint / "config.json").write_text(json.dumps(config))
    return unpacked


@pytest.mark.parametrize("kind", FORMATS)
def test_answers(kind, tmp_path):
    if kind == "fp8" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM multiplies float8 weights on CPUs with AMX only")
    checkpoint = save_checkpoint(tmp_path)
    prompts = random_prompts((10, 70, 200, 333))
    reference = load_reference(checkpoint)
    dtype = FORMATS[kind][1]
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype).float()
    exact = expected_answers(reference, prompts, NEW)
    modules = dict(reference.named_parameters())
    for name, weight in quantize(checkpoint, kind).items():
        modules[name].data.copy_(weight)
    wanted = expected_answers(reference, prompts, NEW)
    assert wanted != exact
    with running(checkpoint, dtype=str(dtype).removeprefix("torch.")) as llm:
        found = answers(llm, prompts, NEW)
    for prompt, answer, tokens in zip(prompts, found, wanted, strict=True):
        assert_same_answers(reference, [prompt], [answer], [tokens], ROUNDING[dtype])
