"""Schedule and producer warp of `hopper_kernel`.

The producer loads queries, keys and values with the tensor memory accelerator (TMA). The consumer warps follow the
same schedule.

M queries of a block, N keys of a step, D head_dim; a stage of the pipeline holds keys and values of one step: two
blocks of a block list if BLOCK_SPARSE, N / PAGE_SIZE pages if PAGE_SIZE is not 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Names that Gluon changed between Triton 3.6 and 3.9.
wait_for_group = getattr(gl, "thread_barrier", None) or gl.barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def schedule(
    first_query, num_queries, first_position, window, num_sinks, num_edge, num_whole,
    M: gl.constexpr, N: gl.constexpr, BLOCK_SPARSE: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """Schedule of a query block: (diagonal, interior, edge, diagonal steps, edge steps, masked steps, all steps).

    In window attention, `diagonal`, `interior` and `edge` are positions of first keys. The steps are the diagonal, the
    edge of the window and the sinks, all with a mask, then the interior, where every query sees every key. Steps over
    pages start at multiples of N. In block-sparse attention, `num_edge` blocks with a mask come before `num_whole` ones
    without. A block without queries has no steps.
    """
    if BLOCK_SPARSE:
        edge_steps = (num_edge + 1) // 2
        return 0, 0, 0, 0, edge_steps, edge_steps, edge_steps + num_whole // 2
    diagonal = first_position // N * N if PAGED else first_position
    diagonal_steps = (first_position + M - diagonal + N - 1) // N
    all_see_from = gl.maximum(first_position + M - window, num_sinks)
    interior_steps = gl.maximum((diagonal - all_see_from) // N, 0)
    interior = diagonal - interior_steps * N
    first_seen = gl.maximum(first_position - window + 1, num_sinks)
    edge_steps = (gl.maximum(interior - first_seen, 0) + N - 1) // N
    sink_steps = (num_sinks + N - 1) // N
    masked = diagonal_steps + edge_steps + sink_steps
    steps = gl.where(first_query < num_queries, masked + interior_steps, 0)
    return diagonal, interior, interior - edge_steps * N, diagonal_steps, edge_steps, masked, steps


@gluon.jit
def window_step(
    step, diagonal, interior, edge, diagonal_steps, edge_steps, masked, N: gl.constexpr
):  # fmt: skip
    """First position of a step's keys, and a flag for sinks."""
    on_edge = step - diagonal_steps
    on_sinks = on_edge - edge_steps
    start = gl.where(on_edge < 0, diagonal + step * N, edge + on_edge * N)
    is_sink = (on_sinks >= 0) & (step < masked)
    start = gl.where(is_sink, on_sinks * N, start)
    return gl.where(step >= masked, interior + (step - masked) * N, start), is_sink


@gluon.jit
def block_list_step(
    step, blocks_ptr, num_edge, edge_steps, EDGE: gl.constexpr, BLOCK: gl.constexpr
):
    """First positions of a step's two blocks; negative, before every key, for a missing one."""
    entry = gl.where(step < edge_steps, step * 2, EDGE + (step - edge_steps) * 2)
    first = gl.load(blocks_ptr + entry) * BLOCK
    present = (step >= edge_steps) | (entry + 1 < num_edge)
    second = gl.load(blocks_ptr + entry + 1, mask=present, other=-1) * BLOCK
    return first, second


@gluon.jit
def _reinterpret(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Buffer of another shape and layout over the same memory."""
    if HAS_REINTERPRET:
        view = buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:
        view = buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)
    return view


@gluon.jit
def _fetch(
    descriptor, sequence, head, first_slot, second_slot, pages, first_page, end_page, missing_page,
    buffers, ready, empty, stage, phase,
    N: gl.constexpr, D: gl.constexpr, BLOCK_SPARSE: gl.constexpr, BLOCK: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Loads keys or values of one step into a stage, as soon as its buffer is free.

    `pages` points to the block table of the sequence, of which entries from `first_page` up to `end_page` are read,
    exclusive. Other pages are zeros, as those out of bounds (`missing_page`): they may belong to another sequence.
    """
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), N * D * 2)
    if BLOCK_SPARSE or PAGE_SIZE > 0:
        # Each unit of some keys and 64 dimensions is one swizzled part of the stage.
        KEYS: gl.constexpr = BLOCK if BLOCK_SPARSE else PAGE_SIZE
        UNITS: gl.constexpr = N // KEYS
        unit_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        units = _reinterpret(
            buffers.index(stage), [D // 64 * UNITS, 1, 1, KEYS, 64], unit_layout
        )  # fmt: skip
        for unit in gl.static_range(UNITS):
            if BLOCK_SPARSE:
                outer = sequence
                slot = first_slot if unit == 0 else second_slot
            else:
                page = first_slot // PAGE_SIZE + unit
                in_use = (page >= first_page) & (page < end_page)
                outer = gl.load(pages + page, mask=in_use, other=missing_page)
                slot = 0
            for half in gl.static_range(D // 64):
                load_tile(
                    descriptor, [outer, head, slot, half * 64],
                    ready.index(stage), units.index(half * UNITS + unit),
                )  # fmt: skip
    else:
        load_tile(
            descriptor, [sequence, head, first_slot, 0], ready.index(stage), buffers.index(stage)
        )  # fmt: skip


@gluon.jit
def _fetch_keys_and_values(
    key_descriptor, value_descriptor, sequence, head, first_slot, second_slot, first_key, end_key,
    pages, missing_page, buffers, barriers, stage, phase,
    N: gl.constexpr, D: gl.constexpr, BLOCK_SPARSE: gl.constexpr, BLOCK: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Loads keys and values of one step; with pages, positions `first_key` to `end_key`, exclusive."""
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    first_page = 0
    end_page = 0
    if PAGE_SIZE > 0:
        first_page = first_key // PAGE_SIZE
        end_page = (end_key + PAGE_SIZE - 1) // PAGE_SIZE
    _fetch(
        key_descriptor, sequence, head, first_slot, second_slot, pages, first_page, end_page, missing_page,
        key_buffers, key_ready, key_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK, PAGE_SIZE,
    )  # fmt: skip
    _fetch(
        value_descriptor, sequence, head, first_slot, second_slot, pages, first_page, end_page, missing_page,
        value_buffers, value_ready, value_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK, PAGE_SIZE,
    )  # fmt: skip


@gluon.jit
def fetch_steps(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SPARSE: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, PAGE_SIZE_2: gl.constexpr,
):  # fmt: skip
    """Loads the queries of a block, then keys and values of its steps, each when its stage is free."""
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2 = (
        descriptors
    )
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    output_ptr, lse_ptr, blocks_ptr, pages_ptr = pointers
    (first_position, first_query, query_offset, window, num_sinks, sequence, head, key_value_head, source, slot_shift,
     sink_shift, num_edge, num_whole, num_queries, missing_page, scale, stride_ot) = scalars  # fmt: skip
    diagonal, interior, edge, diagonal_steps, edge_steps, masked, steps = schedule(
        first_query, num_queries, first_position, window, num_sinks, num_edge, num_whole,
        M, N, BLOCK_SPARSE, PAGE_SIZE > 0,
    )  # fmt: skip
    # Queries of all sequences are packed along one dimension if keys and values are in pages.
    row = sequence * 0 if PAGE_SIZE > 0 else sequence
    if steps > 0:
        mbarrier.expect(query_ready, M * D * 2)
        load_tile(
            query_descriptor, [row, head, query_offset + first_query, 0], query_ready, query_buffer
        )  # fmt: skip
    length = first_position - first_query + num_queries
    first_seen = gl.maximum(first_position - window + 1, num_sinks)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        first_key = 0
        end_key = 0
        if BLOCK_SPARSE:
            first, second = block_list_step(step, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
            first += slot_shift
            second += slot_shift
        else:
            first, is_sink = window_step(
                step, diagonal, interior, edge, diagonal_steps, edge_steps, masked, N
            )
            first += gl.where(is_sink, sink_shift, slot_shift)
            second = first
            first_key = gl.where(is_sink, 0, first_seen)
            end_key = gl.where(is_sink, gl.minimum(length, num_sinks), length)
        if source == 0:
            _fetch_keys_and_values(
                key_descriptor, value_descriptor, sequence, key_value_head, first, second, first_key, end_key,
                pages_ptr, missing_page, buffers, barriers, stage, phase, N, D, BLOCK_SPARSE, BLOCK, PAGE_SIZE,
            )  # fmt: skip
        else:
            _fetch_keys_and_values(
                key_descriptor_2, value_descriptor_2, sequence, key_value_head, first, second, first_key, end_key,
                pages_ptr, missing_page, buffers, barriers, stage, phase, N, D, BLOCK_SPARSE, BLOCK, PAGE_SIZE_2,
            )  # fmt: skip
