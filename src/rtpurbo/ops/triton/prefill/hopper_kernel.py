"""The kernels of `portable_kernels` once more, written for Hopper's asynchronous units.

One warp fetches keys and values through the tensor memory accelerator; two groups of four warps hold
64 query rows each and multiply, the exponentials of one tile running beside the products of the next.
This gave 587 TFLOP/s where the portable kernel gave 524 (docs/experiment-log.md). Same arguments,
same results, held to the same tests.

B sequences, H heads in the table, T query rows, D head_dim (64 or 128);
M = 128 rows of a tile, N = 128 keys of a step, made of two blocks of 64 where blocks come from a list.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rtpurbo.ops.triton.addresses import place_of
from rtpurbo.ops.triton.prefill.hopper_attend import first_rows, second_rows
from rtpurbo.ops.triton.prefill.hopper_fetch import fetch_steps


@gluon.jit
def hopper_kernel(
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2,
    output_ptr, lse_ptr, heads_ptr, key_value_heads_ptr, windows_ptr,
    heads_ptr_2, key_value_heads_ptr_2, windows_ptr_2,
    query_starts_ptr, first_slots_ptr, sink_slots_ptr, first_slots_ptr_2, sink_slots_ptr_2,
    blocks_ptr, counts_ptr,
    T, H, H_1, num_dense, tiles, row_offset, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, width,
    HAS_SLOTS: gl.constexpr, HAS_LSE: gl.constexpr, LISTED: gl.constexpr, EDGE: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head; `portable` says what each argument means."""
    program = gl.program_id(0)
    sequence = gl.program_id(1)
    entry, tile = place_of(program, tiles, H, num_dense)
    # The first heads read one pair of keys and values, the others another.
    source = (entry >= H_1).to(gl.int32)
    if source == 1:
        heads_ptr = heads_ptr_2
        key_value_heads_ptr = key_value_heads_ptr_2
        windows_ptr = windows_ptr_2
        first_slots_ptr = first_slots_ptr_2
        sink_slots_ptr = sink_slots_ptr_2
    place = entry - source * H_1
    head = gl.load(heads_ptr + place)
    key_value_head = gl.load(key_value_heads_ptr + place)
    window = gl.load(windows_ptr + place)
    call_row = row_offset + tile * M
    first_row = gl.load(query_starts_ptr + sequence) + call_row
    if HAS_SLOTS:
        slot_shift = gl.load(first_slots_ptr + sequence)
        sink_shift = gl.load(sink_slots_ptr + sequence)
    else:
        slot_shift = 0
        sink_shift = 0
    num_edge = 0
    num_whole = 0
    if LISTED:
        line = (sequence * H + entry).to(gl.int64) * tiles + tile
        blocks_ptr += line * width
        num_edge = gl.load(counts_ptr + line * 2)
        num_whole = gl.load(counts_ptr + line * 2 + 1)
    output_ptr += sequence.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += sequence.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh

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
        query_descriptor,
        key_descriptor,
        value_descriptor,
        key_descriptor_2,
        value_descriptor_2,
    )
    buffers = (query_buffer, key_buffers, value_buffers)
    barriers = (query_ready, key_ready, key_empty, value_ready, value_empty)
    pointers = (output_ptr, lse_ptr, blocks_ptr)
    scalars = (first_row, call_row, window, num_sinks, sequence, head, key_value_head, source, slot_shift,
               sink_shift, num_edge, num_whole, T, scale, stride_ot)  # fmt: skip
    gl.warp_specialize(
        [
            (first_rows, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
            (second_rows, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
            (fetch_steps, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
