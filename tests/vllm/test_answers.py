"""vLLM generates the tokens of transformers, for any division of the work into chunks and batches."""

import pytest

from rtpurbo.serving.capacity import capacity_of
from tests.vllm.checkpoints import (
    FAMILIES,
    LENGTHS,
    NEW,
    WINDOW,
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import (
    OPTIONS,
    answers,
    assert_same_answers_twice,
    counted_preemptions,
    free_blocks,
    outputs,
    running,
)

pytestmark = pytest.mark.vllm


def test_the_answers_need_the_selection(llama, reference, prompts, expected):
    """Else equal answers would show nothing."""
    import rtpurbo

    changed = rtpurbo.load(llama)[0]
    changed.rtpurbo.set_rule(top_p=1.0)
    assert expected_answers(changed, prompts, NEW) != expected
    changed.rtpurbo.set_rule(top_p=0.8, sliding_window=2 * WINDOW)
    assert expected_answers(changed, prompts, NEW) != expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, family)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)
        assert_predicted_capacity(llm, checkpoint)


def assert_predicted_capacity(llm, checkpoint):
    """The cache holds what `rtpurbo serve` announces."""
    config = llm.llm_engine.vllm_config
    predicted = capacity_of(
        checkpoint,
        2**30,
        in_flight=config.max_in_flight_tokens,
        max_model_len=OPTIONS["max_model_len"],
        dtype="float32",
    )
    held = config.cache_config.kv_cache_size_tokens
    assert held == pytest.approx(predicted.tokens, rel=0.001)


@pytest.mark.parametrize(
    ("index_space", "rule"),
    [
        ("pre_rope", {}),
        ("post_rope", {"granularity": "block", "block_size": 16}),
        ("low_frequency", {"prefill_mode": "top_p"}),
        ("low_frequency", {"reading": "paper", "num_sink_tokens": 20}),
        ("low_frequency", {"retrieval_window": 100, "index_storage": "float8"}),
    ],
)
def test_rules(index_space, rule, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, index_space=index_space, rule=rule)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, max_num_batched_tokens=128) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


def test_shared_index_keys(tmp_path, prompts):
    """One index key per KV head, and more tokens in the same memory than with one per retrieval head."""
    index_keys, token_bytes, held = {}, {}, {}
    for shared_keys in (False, True):
        folder = tmp_path / str(shared_keys)
        checkpoint = save_checkpoint(
            folder,
            layers=((0, 1, 6), range(8), range(8), (5,)),
            shared_keys=shared_keys,
        )
        reference = load_reference(checkpoint)
        wanted = expected_answers(reference, prompts, NEW)
        with running(checkpoint, max_num_batched_tokens=128) as llm:
            assert_same_answers_twice(llm, reference, prompts, wanted)
            config = llm.llm_engine.vllm_config
            cache = config.compilation_config.static_forward_context["rtpurbo.0"]
            index_keys[shared_keys] = [pages.index_keys.shape[1] for pages in cache.pages.values()]
            token_bytes[shared_keys] = cache.spec.state_content_bytes
            held[shared_keys] = config.cache_config.kv_cache_size_tokens
            assert_predicted_capacity(llm, checkpoint)
    assert index_keys == {False: [3, 8, 8, 1], True: [2, 4, 4, 1]}
    # Nine index keys of eight dimensions in float32.
    assert token_bytes[False] - token_bytes[True] == 9 * 8 * 4
    assert held[True] > held[False]


@pytest.mark.parametrize("layers", [((), ()), (range(8), range(8)), ((0,),)])
def test_layers_of_one_kind(layers, tmp_path, prompts):
    checkpoint = save_checkpoint(tmp_path, layers=layers)
    reference = load_reference(checkpoint)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted)


@pytest.mark.parametrize("chunk", [1024, 64, 17])
def test_chunks_and_repeated_prefixes(chunk, llama, reference, prompts, expected):
    with running(llama, max_num_batched_tokens=chunk) as llm:
        first, second = assert_same_answers_twice(llm, reference, prompts, expected)
        assert sum(output.num_cached_tokens for output in first) == 0
        for output, length in zip(second, LENGTHS, strict=True):
            assert output.num_cached_tokens == (length - 1) // 16 * 16


def test_without_prefix_caching(llama, reference, prompts, expected):
    with running(llama, enable_prefix_caching=False, max_num_batched_tokens=100) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), expected)


def test_compiled(llama, reference, prompts, expected):
    with running(llama, enforce_eager=False) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), expected)


def test_diverging_prefixes(llama, prompts, reference):
    long, other = prompts[4], prompts[3]
    # Inside the block of the sinks, at edges of blocks, inside the window, near the end.
    diverging = [long[:same] + other[:50] for same in (3, 15, 16, 64, 300, 304, 590)]
    wanted = expected_answers(reference, diverging, NEW)
    with running(llama, max_num_batched_tokens=64) as llm:
        answers(llm, [long], NEW)
        for prompt, answer, same in zip(
            diverging, wanted, (3, 15, 16, 64, 300, 304, 590), strict=True
        ):
            (output,) = outputs(llm, [prompt], NEW)
            tokens = list(output.outputs[0].token_ids)
            assert_same_answers(reference, [prompt], [tokens], [answer])
            assert output.num_cached_tokens == same // 16 * 16


def test_an_answer_continued(llama, prompts, reference):
    """A second turn reuses what the first one generated, as transformers does with its cache."""
    (answer,) = expected_answers(reference, [prompts[2]], NEW)
    with running(llama) as llm:
        assert answers(llm, [prompts[2]], NEW) == [answer]
        (output,) = outputs(llm, [prompts[2] + answer + prompts[1]], NEW)
        assert output.num_cached_tokens == (200 + NEW - 1) // 16 * 16


def test_preemption(llama, reference, monkeypatch):
    """Short prompts with long answers in a small pool: some must give their blocks back."""
    preemptions = counted_preemptions(monkeypatch)
    short = random_prompts((33, 40, 47, 55, 62, 70), seed=1)
    wanted = expected_answers(reference, short, 150)
    for caching in (True, False):
        preemptions.clear()
        with running(
            llama,
            num_gpu_blocks_override=100,
            max_model_len=512,
            max_num_batched_tokens=64,
            enable_prefix_caching=caching,
        ) as llm:
            free = free_blocks(llm)
            assert_same_answers(reference, short, answers(llm, short, 150), wanted)
            assert free_blocks(llm) == free
        assert preemptions


def test_a_prompt_larger_than_the_free_blocks(llama, reference, prompts, expected):
    """It is let in because its old blocks are given back while it is read."""
    with running(
        llama, num_gpu_blocks_override=68, max_model_len=704, max_num_batched_tokens=64
    ) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), expected)


def test_a_batch_of_sixteen(llama, reference):
    lengths = [12 + 41 * number % 500 for number in range(16)]
    batch = random_prompts(lengths, seed=2)
    wanted = expected_answers(reference, batch, NEW)
    with running(llama, max_num_seqs=16) as llm:
        assert_same_answers(reference, batch, answers(llm, batch, NEW), wanted)
