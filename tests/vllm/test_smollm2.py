"""The real model: SmolLM2-135M-Instruct, its trained indexers, and prompts of 10 to 4,000 tokens."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

import rtpurbo
from rtpurbo.serving.capacity import capacity_of
from tests.vllm.checkpoints import assert_same_answers, expected_answers
from tests.vllm.engines import answers, counted_preemptions, free_blocks, outputs, running

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARTIFACT = Path(__file__).parents[2] / "artifacts" / "smollm2-135m-instruct"
PROMPTS, SHORTEST, LONGEST, NEW = 50, 10, 4000, 16
CONTEXT = 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return rtpurbo.export(ARTIFACT, tmp_path_factory.mktemp("smollm2") / "export", "vllm")


@pytest.fixture(scope="module")
def loaded():
    return rtpurbo.load(ARTIFACT)


@pytest.fixture(scope="module")
def prompts(loaded):
    """Passages of Python's manual, each from another place."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ratio = (LONGEST / SHORTEST) ** (1 / (PROMPTS - 1))
    lengths = [round(SHORTEST * ratio**number) for number in range(PROMPTS)]
    assert lengths[-1] == LONGEST
    size = len(text) // PROMPTS
    starts = [number * size for number in reversed(range(PROMPTS))]
    passages = [text[start : start + 8 * LONGEST] for start in starts]
    return [
        loaded[1](passage)["input_ids"][:length]
        for passage, length in zip(passages, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    return expected_answers(loaded[0], prompts, NEW)


def test_all_prompts_in_batches_of_sixteen_and_from_the_cache(
    checkpoint, loaded, prompts, expected
):
    with running(checkpoint, max_model_len=CONTEXT, max_num_batched_tokens=1024) as llm:
        free = free_blocks(llm)
        # All of them need more blocks than there are: only the few that come again at once are still held.
        for batch in (slice(None), slice(28, 36), slice(28, 36), slice(44, 46), slice(44, 46)):
            found = outputs(llm, prompts[batch], NEW)
            tokens = [list(output.outputs[0].token_ids) for output in found]
            assert_same_answers(loaded[0], prompts[batch], tokens, expected[batch])
        assert all(output.num_cached_tokens > 0 for output in found)
        assert free_blocks(llm) == free
        diverging = [prompts[45][:2000] + prompts[30], prompts[45][:900] + prompts[31][:100]]
        wanted = expected_answers(loaded[0], diverging, NEW)
        found = outputs(llm, diverging, NEW)
        assert all(output.num_cached_tokens > 0 for output in found)
        tokens = [list(output.outputs[0].token_ids) for output in found]
        assert_same_answers(loaded[0], diverging, tokens, wanted)


def test_all_prompts_in_chunks_of_sixty_four(checkpoint, loaded, prompts, expected):
    with running(checkpoint, max_model_len=CONTEXT, max_num_batched_tokens=64) as llm:
        assert_same_answers(loaded[0], prompts, answers(llm, prompts, NEW), expected)


def test_preemption(checkpoint, loaded, prompts, monkeypatch):
    preemptions = counted_preemptions(monkeypatch)
    short = prompts[8:16]
    wanted = expected_answers(loaded[0], short, 160)
    with running(
        checkpoint, max_model_len=512, max_num_batched_tokens=64, num_gpu_blocks_override=90
    ) as llm:
        assert_same_answers(loaded[0], short, answers(llm, short, 160), wanted)
    assert preemptions


def test_capacity(checkpoint):
    memory, context, in_flight = 2**30, 8192, 512
    predicted = capacity_of(checkpoint, memory, in_flight=in_flight, dtype="float32")
    with running(checkpoint, max_model_len=context, max_num_batched_tokens=in_flight) as llm:
        tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(f"{tokens} tokens, predicted: {predicted}")
    assert abs(tokens / predicted.tokens - 1) < 0.05
    assert tokens > 2 * predicted.dense_tokens
