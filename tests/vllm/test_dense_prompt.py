"""Dense queries at the end of prompts equal those of the transformers path, which reads a prompt in one forward."""

import pytest

import rtpurbo
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.serving.vllm.layout import plan_cache
from rtpurbo.serving.vllm.rank_heads import TokenBytes
from tests.vllm.checkpoints import (
    WINDOW,
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import (
    answers,
    assert_same_answers_twice,
    counted_preemptions,
    free_blocks,
    greedy,
    outputs,
    running,
    scheduler,
)

pytestmark = pytest.mark.vllm

# In 593 tokens, a repeated prefix leaves the last one.
LENGTHS = (10, 70, 201, 333, 593, 17)
DENSE = 48
NEW = 24
RULE = {"dense_prompt_queries": DENSE}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), rule=RULE)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(reference, prompts):
    return expected_answers(reference, prompts, NEW)


def windowed_blocks(llm, request):
    """Blocks of a request in each windowed group."""
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[1:]
    assert managers
    return [
        sum(not block.is_null for block in manager.req_to_blocks[request]) for manager in managers
    ]


def test_the_answers_need_them(llama, prompts, expected):
    changed = rtpurbo.load(llama)[0]
    changed.rtpurbo.set_rule(dense_prompt_queries=0)
    found = expected_answers(changed, prompts, NEW)
    different = [
        length for length, *pair in zip(LENGTHS, found, expected, strict=True) if pair[0] != pair[1]
    ]
    assert set(different) >= {201, 333, 593}
    assert all(length > WINDOW for length in different)


@pytest.mark.parametrize("chunk", [1024, 64, 17])
def test_chunks_and_repeated_prefixes(chunk, llama, reference, prompts, expected):
    with running(llama, max_num_batched_tokens=chunk) as llm:
        _, second = assert_same_answers_twice(llm, reference, prompts, expected)
        for output, length in zip(second, LENGTHS, strict=True):
            assert output.num_cached_tokens == (length - 1) // 16 * 16


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        (((1, 2), (), (5,)), {"prefill_mode": "top_p"}),
        # 161, 97 and 54 dense queries.
        (((1, 2), (), (5,)), {"dense_prompt_tokens": 180}),
        # No retrieval heads, and nothing but full KV heads.
        (((), ()), {}),
        (((0, 2, 4, 6), (1, 3, 5, 7)), {}),
    ],
)
def test_layers_and_rules(layers, rule, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, layers=layers, rule=RULE | rule)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=100, enable_prefix_caching=False) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


def test_a_question_after_a_cached_document(tmp_path, prompts):
    """Its dense queries read the document in local heads too, not only the last window of it."""
    # In a single layer, keys and values do not depend on which queries of the document were dense.
    checkpoint = save_checkpoint(tmp_path, layers=((),), rule=RULE)
    reference = load_reference(checkpoint)
    document = prompts[4][:512]
    asked = [document + question for question in random_prompts((40, 9, 70), seed=3)]
    wanted = expected_answers(reference, asked, NEW)
    reference.rtpurbo.set_rule(dense_prompt_queries=0)
    assert expected_answers(reference, asked, NEW) != wanted
    reference.rtpurbo.set_rule(dense_prompt_queries=DENSE)
    with running(checkpoint, max_num_batched_tokens=128) as llm:
        answers(llm, [document], 1)
        found = outputs(llm, asked, NEW)
        assert [output.num_cached_tokens for output in found] == [512] * len(asked)
        tokens = [list(output.outputs[0].token_ids) for output in found]
        assert_same_answers(reference, asked, tokens, wanted)


def test_windows_are_freed_after_the_prompt(llama, prompts):
    config = ArtifactConfig.read(llama).config
    plan = plan_cache(config, TokenBytes.of(config, 32, 4), tokens=1024, in_flight=64)
    assert plan.keeps_prompts
    with running(llama, max_num_batched_tokens=64) as llm:
        engine, free = llm.llm_engine, free_blocks(llm)
        engine.add_request("0", {"prompt_token_ids": prompts[4]}, greedy(NEW))
        held = []
        while engine.has_unfinished_requests():
            (request,) = scheduler(llm).requests.values() if scheduler(llm).requests else (None,)
            engine.step()
            if request is not None and not request.is_finished():
                blocks = windowed_blocks(llm, request.request_id)
                held.append((request.num_computed_tokens, blocks))
        sizes = [group.block_size for group in plan.windowed]
        read = [blocks for computed, blocks in held if computed <= 593]
        after = [blocks for computed, blocks in held if computed > 594]
        assert read[-1] == [-(-593 // size) for size in sizes]
        for blocks in after:
            limits = [group.num_windowed_blocks(1024, WINDOW, 4, 1) for group in plan.windowed]
            assert all(count <= limit for count, limit in zip(blocks, limits, strict=True))
        assert after
        assert free_blocks(llm) == free


@pytest.mark.parametrize("caching", [True, False])
def test_preemption(caching, llama, reference, monkeypatch):
    """Requests that lose their blocks compute prompt and answer again, in one chunk or several."""
    preemptions = counted_preemptions(monkeypatch)
    short = random_prompts((90, 140, 77, 155, 120, 70), seed=1)
    wanted = expected_answers(reference, short, 100)
    with running(
        llama,
        num_gpu_blocks_override=70,
        max_model_len=512,
        max_num_batched_tokens=200,
        enable_prefix_caching=caching,
    ) as llm:
        free = free_blocks(llm)
        assert_same_answers(reference, short, answers(llm, short, 100), wanted)
        assert free_blocks(llm) == free
    assert preemptions
