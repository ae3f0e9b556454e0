"""Engines on a GPU: answers equal those of transformers with the same kernels on the same GPU.

Run with `pytest -m "gpu and vllm" tests/vllm/test_on_gpu.py`. Decode kernels round selections up to a whole level of
scores, so answers differ from those of the eager path; that is why the reference uses kernels.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rtpurbo
from rtpurbo.models.sparse_layers import headwise_modules
from tests.vllm.checkpoints import (
    CONTEXT,
    FLOAT8_TIE,
    NEW,
    assert_same_answers,
    expected_answers,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import (
    answers,
    assert_same_answers_twice,
    counted_preemptions,
    free_blocks,
    running,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# A share of the memory that leaves room for other engines on the same GPU.
MEMORY = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.2}
CAPTURED = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **CAPTURED},
    },
    "compiled": {"enforce_eager": False, "compilation_config": CAPTURED},
}
# Log-probabilities of a token differ by this much between a dtype and float32, with weights in that dtype.
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}


def load_reference(checkpoint):
    """The same checkpoint as a transformers model on the GPU, in float32, with the Triton kernels."""
    model, _ = rtpurbo.load(checkpoint, device="cuda")
    for module in headwise_modules(model):
        module.backend = "triton"
    return model


@pytest.fixture(scope="module")
def reference(llama):
    return load_reference(llama)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_windows_that_cover_everything_equal_the_dense_model(dtype, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, rule={"sliding_window": CONTEXT})
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).float().cuda()
    wanted = expected_answers(dense, prompts, NEW)
    options = {"dtype": str(dtype).removeprefix("torch."), "max_num_batched_tokens": 128}
    with running(checkpoint, **options, **MEMORY) as llm:
        found = answers(llm, prompts, NEW)
    for prompt, answer, tokens in zip(prompts, found, wanted, strict=True):
        same = next((n for n in range(NEW) if answer[n] != tokens[n]), NEW)
        if same < NEW:
            log_probabilities = next_token(dense, prompt + tokens[:same])
            gap = log_probabilities[tokens[same]] - log_probabilities[answer[same]]
            assert 0 <= gap < ROUNDING[dtype], (len(prompt), same, float(gap))


@torch.no_grad()
def next_token(model, tokens):
    """Log-probabilities of the token after these, without a cache."""
    tokens = torch.tensor([tokens], device=model.device)
    return model(tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("runner", ["0", "1"], ids=["first", "second"])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_prefix_hits(mode, runner, llama, reference, prompts, expected, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with running(llama, max_num_batched_tokens=128, **MODES[mode], **MEMORY) as llm:
        _, second = assert_same_answers_twice(llm, reference, prompts, expected)
        assert all(output.num_cached_tokens for output in second[1:5])


@pytest.mark.parametrize(
    ("index_space", "rule"),
    [
        ("pre_rope", {}),
        ("post_rope", {"granularity": "block", "block_size": 16}),
        ("low_frequency", {"reading": "paper", "num_sink_tokens": 20}),
        ("low_frequency", {"retrieval_window": 100, "min_tokens": 0}),
    ],
)
@pytest.mark.parametrize("shared_keys", [False, True])
def test_rules(index_space, rule, shared_keys, tmp_path, prompts):
    checkpoint = save_checkpoint(
        tmp_path, index_space=index_space, rule=rule, shared_keys=shared_keys
    )
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=128, **MODES["graphs"], **MEMORY) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_float8_cache(mode, llama, prompts, round_cache):
    reference = load_reference(llama)
    round_cache(1.0, 1.0)
    wanted = expected_answers(reference, prompts, NEW)
    options = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 128}
    with running(llama, **options, **MODES[mode], **MEMORY) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted, FLOAT8_TIE)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3_text", "gpt_oss"])
def test_families(family, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, family)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, **MODES["graphs"], **MEMORY) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_preemption(mode, llama, reference, monkeypatch):
    preemptions = counted_preemptions(monkeypatch)
    short = random_prompts((33, 40, 47, 55, 62, 70), seed=1)
    wanted = expected_answers(reference, short, 150)
    options = {"num_gpu_blocks_override": 100, "max_model_len": 512, "max_num_batched_tokens": 64}
    with running(llama, **options, **MODES[mode], **MEMORY) as llm:
        free = free_blocks(llm)
        assert_same_answers(reference, short, answers(llm, short, 150), wanted)
        assert free_blocks(llm) == free
    assert preemptions


def test_long_prompts(tmp_path):
    checkpoint = save_checkpoint(
        tmp_path, rule={"sliding_window": 1024}, max_position_embeddings=32768
    )
    reference = load_reference(checkpoint)
    prompts = random_prompts((5_000, 30_000, 1_500, 12_345), seed=3)
    wanted = expected_answers(reference, prompts, NEW)
    options = {"max_model_len": 32768, "max_num_batched_tokens": 2048}
    with running(checkpoint, **options, **MODES["graphs"], **MEMORY) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)
