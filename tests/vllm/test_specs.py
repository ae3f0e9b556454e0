import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from rtpurbo.serving.vllm.specs import (
    OwnBlocksManager,
    OwnBlocksSpec,
    SinkWindowManager,
    SinkWindowSpec,
)

pytestmark = pytest.mark.vllm

SIZE = 16
init_none_hash(sha256)


def spec_of(window=64, sinks=4, block_size=SIZE, max_blocks=1000, keeps_prompts=False, **more):
    return SinkWindowSpec(
        block_size=block_size,
        num_kv_heads=1,
        num_head_slots=1,
        head_size=8,
        state_content_bytes=64,
        dtype=torch.float32,
        sliding_window=window,
        num_sink_tokens=sinks,
        group=1,
        max_blocks=max_blocks,
        keeps_prompts=keeps_prompts,
        **more,
    )


def pool_of(blocks=200):
    return BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=SIZE)


def manager_of(pool, spec):
    return SinkWindowManager(
        spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=spec.block_size,
    )


def request_of(tokens, name="request"):
    return Request(
        name,
        list(tokens),
        SamplingParams(max_tokens=1),
        None,
        block_hasher=get_request_block_hasher(SIZE, sha256),
    )


def hit_of(manager, request, alignment=SIZE):
    hits, length = manager.find_longest_cache_hit(
        request.block_hashes,
        request.num_tokens,
        [0],
        manager.block_pool,
        manager.kv_cache_spec,
        False,
        alignment,
    )
    return hits[0], length


def cache_some(pool, request, spec, kept):
    """Puts those of the request's blocks into the cache whose places are true in `kept`."""
    blocks = pool.get_new_blocks(len(kept))
    pool.cache_full_blocks(request, blocks, 0, len(kept), spec.block_size, 0, block_mask=kept)
    return blocks


@settings(max_examples=300)
@given(
    st.lists(st.booleans(), min_size=1, max_size=24),
    st.integers(1, 100),
    st.integers(0, 40),
    st.sampled_from([1, 2, 4]),
)
def test_a_hit_is_the_longest_prefix_whose_sinks_and_window_are_cached(
    kept, window, sinks, alignment
):
    spec, pool = spec_of(window, sinks), pool_of()
    request = request_of(range(len(kept) * SIZE))
    blocks = cache_some(pool, request, spec, kept)
    hit, length = hit_of(manager_of(pool, spec), request, alignment * SIZE)

    def needed(end):
        return {
            number
            for number in range(end)
            if number * SIZE < sinks or number >= end - -(-(window - 1) // SIZE)
        }

    expected = next(
        end
        for end in range(len(kept), -1, -1)
        if end % alignment == 0 and all(kept[number] for number in needed(end))
    )
    assert length == expected * SIZE
    assert len(hit) == expected
    for number, block in enumerate(hit):
        if number in needed(expected):
            assert block is blocks[number]
        else:
            assert block.is_null


def step(manager, request, computed, end):
    """Runs the scheduler's calls for a chunk, and returns the blocks that they requested."""
    name = request.request_id
    manager.remove_skipped_blocks(name, computed, request.num_prompt_tokens)
    asked = manager.get_num_blocks_to_allocate(name, end, [], computed, computed, end)
    manager.allocate_new_blocks(name, end, end)
    manager.cache_blocks(request, end, replay_boundaries=[])
    return asked


@pytest.mark.parametrize(("window", "sinks", "chunk"), [(64, 4, 64), (33, 20, 16), (1, 0, 48)])
def test_a_request_keeps_sinks_and_window_and_frees_all_blocks(window, sinks, chunk):
    pool = pool_of()
    bound = -(-(window - 1 + chunk) // SIZE) + 1 + -(-sinks // SIZE)
    manager = manager_of(pool, spec_of(window, sinks, max_blocks=bound))
    request = request_of(range(640))
    free = pool.get_num_free_blocks()
    manager.add_local_computed_blocks("request", [], 0, 0)
    for computed in range(0, 640, chunk):
        before = pool.get_num_free_blocks()
        held_before = sum(not block.is_null for block in manager.req_to_blocks["request"])
        asked = step(manager, request, computed, min(computed + chunk, 640))
        held = manager.req_to_blocks["request"]
        real = {number for number, block in enumerate(held) if not block.is_null}
        assert before - pool.get_num_free_blocks() == len(real) - held_before
        assert asked >= len(real) - held_before
        assert len(real) <= bound
        seen = range(max(0, computed - window + 1), min(computed + chunk, 640))
        assert real >= {token // SIZE for token in (*seen, *range(min(sinks, computed)))}
    manager.free("request")
    assert pool.get_num_free_blocks() == free


def test_taking_a_prefix_keeps_its_sinks_and_counts_them():
    pool = pool_of()
    spec = spec_of(window=32, sinks=4)
    manager = manager_of(pool, spec)
    first, second = request_of(range(320), "first"), request_of(range(400), "second")
    manager.add_local_computed_blocks("first", [], 0, 0)
    for computed in range(0, 320, 64):
        step(manager, first, computed, computed + 64)
    manager.free("first")

    hit, length = hit_of(manager, second)
    assert length == 320
    assert not hit[0].is_null
    free = pool.get_num_free_blocks()
    asked = manager.get_num_blocks_to_allocate("second", 400, hit, length, length, 400)
    manager.add_local_computed_blocks("second", hit, length, 0)
    manager.allocate_new_blocks("second", 400, 400)
    assert free - pool.get_num_free_blocks() == asked
    held = manager.req_to_blocks["second"]
    assert held[0] is hit[0]
    assert [number for number, block in enumerate(held[:20]) if not block.is_null] == [0, 18, 19]
    manager.free("second")
    assert pool.get_num_free_blocks() == 199


def real_blocks(manager, name):
    blocks = manager.req_to_blocks[name]
    return {number for number, block in enumerate(blocks) if not block.is_null}


def test_all_blocks_are_kept_until_a_prompt_has_been_read():
    pool = pool_of()
    manager = manager_of(pool, spec_of(keeps_prompts=True, max_blocks=50))
    request = request_of(range(400))
    manager.add_local_computed_blocks("request", [], 0, 0)
    for computed in range(0, 400, 100):
        free = pool.get_num_free_blocks()
        asked = step(manager, request, computed, computed + 100)
        assert free - pool.get_num_free_blocks() == asked
        assert real_blocks(manager, "request") == set(range(-(-(computed + 100) // SIZE)))
    request.append_output_token_ids(7)
    step(manager, request, 400, 401)
    assert real_blocks(manager, "request") == {0, *range(21, 26)}
    manager.free("request")
    assert pool.get_num_free_blocks() == 199


@pytest.mark.parametrize("evicted", [(), (12,), (5, 12, 15)])
def test_a_prefix_is_reused_up_to_a_block_that_is_missing(evicted):
    pool = pool_of()
    spec = spec_of(window=32, sinks=4, keeps_prompts=True)
    blocks = cache_some(pool, request_of(range(320)), spec, [True] * 20)
    pool.free_blocks(reversed(blocks))
    pool.evict_blocks({blocks[number].block_id for number in evicted})
    manager, request = manager_of(pool, spec), request_of(range(400), "second")
    hit, length = hit_of(manager, request)
    assert length == 320
    kept = set(range(min(evicted, default=20)))
    free = pool.get_num_free_blocks()
    asked = manager.get_num_blocks_to_allocate("second", 400, hit, length, length, 400)
    manager.add_local_computed_blocks("second", hit, length, 0)
    manager.allocate_new_blocks("second", 400, 400)
    assert free - pool.get_num_free_blocks() == asked
    assert real_blocks(manager, "second") == kept | {18, 19} | set(range(20, 25))
    request.append_output_token_ids(7)
    step(manager, request, 400, 401)
    assert real_blocks(manager, "second") == {0, 23, 24, 25}
    manager.free("second")
    assert pool.get_num_free_blocks() == 199


def test_without_its_sinks_a_prefix_is_not_taken():
    pool, spec = pool_of(), spec_of(window=32, sinks=4)
    request = request_of(range(320))
    blocks = cache_some(pool, request, spec, [True] * 20)
    assert hit_of(manager_of(pool, spec), request)[1] == 320
    pool.free_blocks([blocks[0]])
    pool.evict_blocks({blocks[0].block_id})
    assert hit_of(manager_of(pool, spec), request) == ([], 0)


def test_a_prefix_that_diverges_ends_before_the_first_other_block():
    pool, spec = pool_of(), spec_of(window=32, sinks=4)
    cache_some(pool, request_of(range(320)), spec, [True] * 20)
    manager = manager_of(pool, spec)
    for same, expected in ((0, 0), (15, 0), (16, 16), (100, 96), (319, 304)):
        other = request_of([*range(same), *range(1000, 1320 - same)])
        assert hit_of(manager, other)[1] == expected


def test_the_last_tokens_of_a_prompt_are_not_taken():
    pool, spec = pool_of(), spec_of(window=32, sinks=4, num_recomputed_tokens=40)
    cache_some(pool, request_of(range(320)), spec, [True] * 20)
    manager = manager_of(pool, spec)
    for tokens, expected in ((20, 0), (50, 0), (64, 16), (100, 48), (327, 272), (400, 320)):
        assert hit_of(manager, request_of(range(tokens)))[1] == expected


def test_a_request_after_its_prompt_takes_no_prefix():
    for recomputed in (0, 40):
        manager = manager_of(pool_of(), spec_of(num_recomputed_tokens=recomputed))
        request = request_of(range(100))
        manager.add_local_computed_blocks("request", [], 0, 0)
        for computed, end in ((0, 60), (60, 100), (100, 101)):
            assert not request.skip_reading_prefix_cache
            request.num_computed_tokens = computed
            step(manager, request, computed, end)
        assert request.skip_reading_prefix_cache == (recomputed > 0)


def test_blocks_of_its_own():
    spec = OwnBlocksSpec(
        block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32, num_blocks=3
    )
    pool = pool_of()
    free = pool.get_num_free_blocks()
    manager = OwnBlocksManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=SIZE
    )
    requests = [request_of(range(100), name) for name in "ab"]
    for request in requests:
        name = request.request_id
        manager.add_local_computed_blocks(name, [], 0, 0)
        asked = [step(manager, request, computed, computed + 20) for computed in range(0, 100, 20)]
        assert asked == [3, 0, 0, 0, 0]
    held = [block for blocks in manager.req_to_blocks.values() for block in blocks]
    assert len({block.block_id for block in held}) == 6
    assert all(block.block_hash is None for block in held)
    assert spec.max_memory_usage_bytes(None) == 3 * spec.page_size_bytes
    for request in requests:
        manager.free(request.request_id)
    assert pool.get_num_free_blocks() == free


def test_specs_of_one_group_alone_share_a_block_table():
    spec = spec_of()
    other = SinkWindowSpec(**{**vars(spec), "group": 2})
    assert spec.is_uniform_with_collection({"a": spec, "b": spec_of(max_blocks=7)})
    assert not spec.is_uniform_with_collection({"a": spec, "b": other})
    assert spec.max_memory_usage_bytes(None) == 1000 * SIZE * 64
