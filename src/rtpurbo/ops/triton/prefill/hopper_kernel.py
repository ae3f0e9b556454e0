"""Warp-specialised prefill kernel for Hopper, with the semantics of `portable_kernels`.

A producer warp loads keys and values with TMA; two consumer groups of four warps compute 64 queries each, and
the exponentials of one step overlap with the products of the next. It reaches 587 TFLOP/s where the portable
kernel reaches 524 (docs/experiment-log.md). Both kernels pass the same tests.

B sequences, H heads in the table, T queries, D head_dim (64 or 128);
M = 128 queries of a block, N = 128 keys of a step: two blocks of 64 from a block list if BLOCK_SPARSE, N / PAGE_SIZE
pages if PAGE_SIZE is not 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rtpurbo.ops.triton.device_functions import head_and_block
from rtpurbo.ops.triton.prefill.hopper_attend import attend_half
from rtpurbo.ops.triton.prefill.hopper_fetch import fetch_steps

# Not specialised: 1 would become a constant, which cannot be assigned to, and another multiple of 16 another kernel.
SIZES = [
    "T",
    "H",
    "H_1",
    "num_dense",
    "list_start",
    "num_sinks",
    "width",
    "stride_pages",
    "stride_pages_2",
    "num_pages",
    "num_pages_2",
]


@gluon.jit(do_not_specialize=SIZES)
def hopper_kernel(
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2,
    output_ptr, lse_ptr, heads_ptr, key_value_heads_ptr, windows_ptr,
    heads_ptr_2, key_value_heads_ptr_2, windows_ptr_2,
    query_starts_ptr, first_slots_ptr, sink_slots_ptr, first_slots_ptr_2, sink_slots_ptr_2,
    blocks_ptr, counts_ptr, pages_ptr, pages_ptr_2, query_offsets_ptr, query_counts_ptr,
    T, H, H_1, num_dense, list_start, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, width,
    stride_pages, stride_pages_2, num_pages, num_pages_2,
    HAS_SLOTS: gl.constexpr, HAS_LSE: gl.constexpr, BLOCK_SPARSE: gl.constexpr, EDGE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, PAGE_SIZE_2: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One query block of one head; arguments as in `portable`."""
    program = gl.program_id(0)
    sequence = gl.program_id(1)
    tiles = gl.num_programs(0) // H
    entry, tile = head_and_block(program, tiles, H, num_dense)
    # The first H_1 heads read the first pair of keys and values, the others the second one.
    source = (entry >= H_1).to(gl.int32)
    if source == 1:
        heads_ptr = heads_ptr_2
        key_value_heads_ptr = key_value_heads_ptr_2
        windows_ptr = windows_ptr_2
        first_slots_ptr = first_slots_ptr_2
        sink_slots_ptr = sink_slots_ptr_2
        pages_ptr = pages_ptr_2
        stride_pages = stride_pages_2
        num_pages = num_pages_2
    place = entry - source * H_1
    head = gl.load(heads_ptr + place)
    key_value_head = gl.load(key_value_heads_ptr + place)
    window = gl.load(windows_ptr + place)
    first_query = list_start + tile * M
    first_position = gl.load(query_starts_ptr + sequence) + first_query
    num_queries = T
    query_offset = sequence * 0
    row = sequence
    if PAGE_SIZE > 0:
        num_queries = gl.load(query_counts_ptr + sequence)
        query_offset = gl.load(query_offsets_ptr + sequence)
        row = sequence * 0
        pages_ptr += sequence.to(gl.int64) * stride_pages
    if HAS_SLOTS:
        slot_shift = gl.load(first_slots_ptr + sequence)
        sink_shift = gl.load(sink_slots_ptr + sequence)
    else:
        slot_shift = 0
        sink_shift = 0
    num_edge = 0
    num_whole = 0
    if BLOCK_SPARSE:
        line = (sequence * H + entry).to(gl.int64) * tiles + tile
        blocks_ptr += line * width
        num_edge = gl.load(counts_ptr + line * 2)
        num_whole = gl.load(counts_ptr + line * 2 + 1)
    output_ptr += row.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += row.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh
    if PAGE_SIZE > 0:
        output_ptr += query_offset.to(gl.int64) * stride_ot
        lse_ptr += query_offset

    element: gl.constexpr = query_descriptor.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    query_buffer = gl.allocate_shared_memory(element, [1, 1, M, D], tile_layout)
    key_buffers = gl.allocate_shared_memory(element, [STAGES, 1, 1, N, D], tile_layout)
    value_buffers = gl.allocate_shared_memory(element, [STAGES, 1, 1, N, D], tile_layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(value_empty.index(stage), count=2)

    descriptors = (
        query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2,
    )  # fmt: skip
    buffers = (query_buffer, key_buffers, value_buffers)
    barriers = (query_ready, key_ready, key_empty, value_ready, value_empty)
    pointers = (output_ptr, lse_ptr, blocks_ptr, pages_ptr)
    scalars = (first_position, first_query, query_offset, window, num_sinks, sequence, head, key_value_head, source,
               slot_shift, sink_shift, num_edge, num_whole, num_queries, num_pages, scale, stride_ot)  # fmt: skip
    gl.warp_specialize(
        [
            (attend_half, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, BLOCK_SPARSE, EDGE, BLOCK, HAS_LSE, PAGE_SIZE > 0, 0,
            )),
            (attend_half, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, BLOCK_SPARSE, EDGE, BLOCK, HAS_LSE, PAGE_SIZE > 0, 1,
            )),
            (fetch_steps, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, BLOCK_SPARSE, EDGE, BLOCK, HAS_LSE, PAGE_SIZE, PAGE_SIZE_2,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
