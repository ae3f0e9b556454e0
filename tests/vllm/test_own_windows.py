"""Layers that are not converted keep their sliding window on vLLM."""

import pytest

from tests.vllm.checkpoints import (
    NEW,
    expected_answers,
    load_reference,
    save_checkpoint,
)
from tests.vllm.engines import assert_same_answers_twice, running

pytestmark = pytest.mark.vllm


def test_chunks_and_prefix_hits(tmp_path, prompts):
    rule = {"dense_prompt_queries": 24}
    checkpoint = save_checkpoint(tmp_path, "gemma3_text", rule=rule, index_space="post_rope")
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=64) as llm:
        _, second = assert_same_answers_twice(llm, reference, prompts, wanted)
        # Blocks have up to 128 tokens.
        assert all(output.num_cached_tokens for output in second[2:5])
