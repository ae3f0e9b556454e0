"""Engines on a GPU: answers equal those of transformers with the same kernels on the same GPU.

Run with `pytest -m "gpu and vllm" tests/vllm/test_on_gpu.py`. Decode kernels round selections up to a whole level of
scores, so answers differ from those of the eager path; that is why the reference uses kernels.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rtpurbo.ops.triton.prefill import hopper
from tests.vllm.checkpoints import (
    CONTEXT,
    FLOAT8_TIE,
    HEAVY_HITTERS,
    NEW,
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import (
    ON_GPU,
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


@pytest.fixture(scope="module")
def reference(llama):
    return load_reference(llama, "cuda")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_windows_that_cover_everything_equal_the_dense_model(dtype, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, rule={"sliding_window": CONTEXT})
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).float().cuda()
    wanted = expected_answers(dense, prompts, NEW)
    options = {"dtype": str(dtype).removeprefix("torch."), "max_num_batched_tokens": 128}
    with running(checkpoint, **options, **ON_GPU) as llm:
        found = answers(llm, prompts, NEW)
    assert_equal_but_for_rounding(dense, prompts, found, wanted, ROUNDING[dtype])


def assert_equal_but_for_rounding(model, prompts, found, wanted, rounding):
    """Answers are equal up to a token whose log-probability differs by less than `rounding`."""
    for prompt, answer, tokens in zip(prompts, found, wanted, strict=True):
        same = next((n for n in range(NEW) if answer[n] != tokens[n]), NEW)
        if same < NEW:
            log_probabilities = next_token(model, prompt + tokens[:same])
            gap = log_probabilities[tokens[same]] - log_probabilities[answer[same]]
            assert abs(gap) < rounding, (len(prompt), same, float(gap))


@torch.no_grad()
def next_token(model, tokens):
    """Log-probabilities of the token after these, without a cache."""
    tokens = torch.tensor([tokens], device=model.device)
    return model(tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("runner", ["0", "1"], ids=["first", "second"])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_prefix_hits(mode, runner, llama, reference, prompts, expected, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with running(llama, max_num_batched_tokens=128, **MODES[mode], **ON_GPU) as llm:
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
    reference = load_reference(checkpoint, "cuda")
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=128, **MODES["graphs"], **ON_GPU) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_float8_cache(mode, llama, prompts, round_cache):
    reference = load_reference(llama, "cuda")
    round_cache(1.0, 1.0)
    wanted = expected_answers(reference, prompts, NEW)
    options = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 128}
    with running(llama, **options, **MODES[mode], **ON_GPU) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted, FLOAT8_TIE)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3_text", "gpt_oss"])
def test_families(family, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, family)
    reference = load_reference(checkpoint, "cuda")
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, **MODES["graphs"], **ON_GPU) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_preemption(mode, llama, reference, monkeypatch):
    preemptions = counted_preemptions(monkeypatch)
    short = random_prompts((33, 40, 47, 55, 62, 70), seed=1)
    wanted = expected_answers(reference, short, 150)
    options = {"num_gpu_blocks_override": 100, "max_model_len": 512, "max_num_batched_tokens": 64}
    with running(llama, **options, **MODES[mode], **ON_GPU) as llm:
        free = free_blocks(llm)
        assert_same_answers(reference, short, answers(llm, short, 150), wanted)
        assert free_blocks(llm) == free
    assert preemptions


def test_long_prompts(tmp_path):
    checkpoint = save_checkpoint(
        tmp_path, rule={"sliding_window": 1024}, max_position_embeddings=32768
    )
    reference = load_reference(checkpoint, "cuda")
    prompts = random_prompts((5_000, 30_000, 1_500, 12_345), seed=3)
    wanted = expected_answers(reference, prompts, NEW)
    options = {"max_model_len": 32768, "max_num_batched_tokens": 2048}
    with running(checkpoint, **options, **MODES["graphs"], **ON_GPU) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize(
    "rule",
    [HEAVY_HITTERS, {"dense_prompt_tokens": CONTEXT}, HEAVY_HITTERS | {"dense_prompt_tokens": CONTEXT}],
    ids=["heavy hitters", "dense prompts", "both"],
)  # fmt: skip
def test_dense_prompts_and_heavy_hitters(rule, mode, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, rule=rule)
    reference = load_reference(checkpoint, "cuda")
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=2048, **MODES[mode], **ON_GPU) as llm:
        assert_same_answers_twice(llm, reference, prompts, wanted)


@pytest.mark.skipif(not hopper.is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prompts_on_the_hopper_kernel(dtype, tmp_path, prompts, monkeypatch):
    """They are those of the portable kernel, up to the rounding of half precision."""
    checkpoint = save_checkpoint(tmp_path, head_dim=64)
    options = {"dtype": str(dtype).removeprefix("torch."), "max_num_batched_tokens": 128}
    calls = []
    supports_pages = hopper.supports_pages

    def counted(*arguments):
        calls.append(supports_pages(*arguments))
        return calls[-1]

    found = []
    for replaced in (counted, lambda *arguments: False):
        monkeypatch.setattr(hopper, "supports_pages", replaced)
        with running(checkpoint, **options, **ON_GPU) as llm:
            found.append(answers(llm, prompts, NEW))
    assert calls
    assert all(calls)
    reference = load_reference(checkpoint, "cuda")
    assert_equal_but_for_rounding(reference, prompts, *found, ROUNDING[dtype])
