"""Heavy hitters of prompts equal those of the transformers path, though requests share the blocks of their sinks."""

import pytest

import rtpurbo
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.serving.vllm.layout import plan_cache
from rtpurbo.serving.vllm.rank_heads import TokenBytes
from tests.vllm.checkpoints import (
    HEAVY_HITTERS,
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

# Chunks of 128 tokens leave more than the 64 that choose in the last one.
LENGTHS = (10, 70, 201, 333, 593, 17)
NEW = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), rule=HEAVY_HITTERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(reference, prompts):
    return expected_answers(reference, prompts, NEW)


def test_the_answers_need_them(llama, prompts, expected):
    changed = rtpurbo.load(llama)[0]
    changed.rtpurbo.set_rule(num_heavy_hitters=0)
    found = expected_answers(changed, prompts, NEW)
    assert [pair[0] != pair[1] for pair in zip(found, expected, strict=True)] == [
        length > 70 for length in LENGTHS
    ]


def test_prompts_in_one_chunk_and_repeated_prefixes(llama, reference, prompts, expected):
    with running(llama, max_num_batched_tokens=2048) as llm:
        _, second = assert_same_answers_twice(llm, reference, prompts, expected)
        assert_predicted_capacity(llm, llama)
        for output, length in zip(second, LENGTHS, strict=True):
            # Whole blocks before the last 64 tokens of whole blocks, which choose again.
            assert output.num_cached_tokens == max(0, length // 16 * 16 - 64)


def assert_predicted_capacity(llm, checkpoint):
    """The capacity that vLLM reports counts the blocks for heavy hitters."""
    config, settings = ArtifactConfig.read(checkpoint).config, llm.llm_engine.vllm_config
    in_flight = settings.max_in_flight_tokens
    plan = plan_cache(config, TokenBytes.of(config, 32, 4), tokens=1024, in_flight=in_flight)
    assert plan.num_own_blocks
    blocks = settings.cache_config.num_gpu_blocks
    held = int(blocks / plan.blocks_per_request(1024, in_flight) * 1024)
    assert settings.cache_config.kv_cache_size_tokens == held


@pytest.mark.parametrize("caching", [True, False])
def test_chunks_with_the_last_queries_of_a_prompt(caching, llama, reference, prompts, expected):
    with running(llama, max_num_batched_tokens=128, enable_prefix_caching=caching) as llm:
        for prompt, wanted in zip(prompts, expected, strict=True):
            assert_same_answers(reference, [prompt], answers(llm, [prompt], NEW), [wanted])


@pytest.mark.parametrize("chunk", [17, 64, 100])
def test_chunks_with_some_of_the_last_queries(chunk, llama, prompts):
    """Every request reads tokens of its own prompt, although other requests had its blocks before."""
    with running(llama, max_num_batched_tokens=chunk, enable_prefix_caching=False) as llm:
        free = free_blocks(llm)
        alone = [answers(llm, [prompt], NEW)[0] for prompt in prompts]
        assert [answers(llm, [prompt], NEW)[0] for prompt in reversed(prompts)] == alone[::-1]
        assert free_blocks(llm) == free


@pytest.mark.parametrize(
    ("family", "layers", "rule"),
    [
        # Blocks with other sinks before the heavy hitters, and with other tokens after them.
        ("llama", ((1, 2), (), (5,)), {"num_sink_tokens": 25, "num_heavy_hitters": 14, "sliding_window": 80}),
        ("llama", ((1, 2), (), (5,)), {"prefill_mode": "top_p"}),
        # No retrieval heads, and nothing but full KV heads.
        ("llama", ((), ()), {}),
        ("llama", (range(8), range(8)), {}),
        ("gemma3_text", ((), (1, 2), (), ()), {}),
        ("gpt_oss", ((), (1, 2), (), ()), {}),
    ],
)  # fmt: skip
def test_layers_and_rules(family, layers, rule, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, family, layers=layers, rule=HEAVY_HITTERS | rule)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=2048) as llm:
        assert_same_answers_twice(llm, reference, prompts, wanted)


def test_requests_with_the_same_prefix_choose_their_own(tmp_path, prompts):
    # In a single layer, keys and values do not depend on which queries of the document were dense.
    checkpoint = save_checkpoint(tmp_path, layers=((),), rule=HEAVY_HITTERS)
    reference = load_reference(checkpoint)
    document = prompts[4][:512]
    asked = [document + question for question in random_prompts((40, 9, 70), seed=3)]
    wanted = expected_answers(reference, asked, NEW)
    with running(checkpoint) as llm:
        answers(llm, [document], 1)
        found = outputs(llm, asked, NEW)
        assert [output.num_cached_tokens for output in found] == [480, 448, 512]
        tokens = [list(output.outputs[0].token_ids) for output in found]
        assert_same_answers(reference, asked, tokens, wanted)
        engine = llm.llm_engine
        for name, prompt in enumerate(asked):
            engine.add_request(str(name), {"prompt_token_ids": prompt}, greedy(2))
        engine.step()
        windowed, own = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        for manager, num_different in ((windowed, 2), (own, 6)):
            held = [blocks[:2] for blocks in manager.req_to_blocks.values()]
            assert len({block.block_id for blocks in held for block in blocks}) == num_different
        while engine.has_unfinished_requests():
            engine.step()


def test_preemption(llama, reference, monkeypatch):
    preemptions = counted_preemptions(monkeypatch)
    short = random_prompts((110, 140, 97, 155, 120, 70), seed=1)
    wanted = expected_answers(reference, short, 100)
    with running(
        llama, num_gpu_blocks_override=90, max_model_len=512, max_num_batched_tokens=1024
    ) as llm:
        free = free_blocks(llm)
        assert_same_answers(reference, short, answers(llm, short, 100), wanted)
        assert free_blocks(llm) == free
    assert preemptions


def test_a_preempted_request_reads_its_prompt_again(tmp_path):
    """Though prompt and answer are in the prefix cache: its blocks for heavy hitters are lost."""
    checkpoint = save_checkpoint(tmp_path, layers=((),), rule=HEAVY_HITTERS)
    reference = load_reference(checkpoint)
    (prompt,) = random_prompts((200,), seed=5)
    (wanted,) = expected_answers(reference, [prompt], 120)
    with running(checkpoint) as llm:
        engine, found = llm.llm_engine, []
        engine.add_request("0", {"prompt_token_ids": prompt}, greedy(120))
        while engine.has_unfinished_requests():
            (request,) = scheduler(llm).requests.values()
            if request.num_output_tokens == 100 and not request.num_preemptions:
                scheduler(llm)._preempt_request(scheduler(llm).running.pop(), 0.0)
                manager = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[-1]
                assert not manager.req_to_blocks
            found = [list(output.outputs[0].token_ids) for output in engine.step()] or found
        assert request.num_preemptions == 1
        assert_same_answers(reference, [prompt], found, [wanted])
