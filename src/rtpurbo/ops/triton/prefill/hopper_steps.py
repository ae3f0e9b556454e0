"""Schedule of `hopper_kernel`: keys of each step, shared by the producer and the consumer warps.

M queries of a block, N keys of a step: two blocks of a block list if BLOCK_SPARSE.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def window_plan(first_position, window, num_sinks, M: gl.constexpr, N: gl.constexpr):
    """Schedule of window attention: (interior, edge, edge steps, masked steps, all steps).

    `interior` and `edge` are positions of first keys. The steps are the diagonal, the edge of the window and
    the sinks, all with a mask, then the interior, where every query sees every key.
    """
    all_see_from = gl.maximum(first_position + M - window, num_sinks)
    interior_steps = gl.maximum((first_position - all_see_from) // N, 0)
    interior = first_position - interior_steps * N
    first_seen = gl.maximum(first_position - window + 1, num_sinks)
    edge_steps = (gl.maximum(interior - first_seen, 0) + N - 1) // N
    sink_steps = (num_sinks + N - 1) // N
    masked = M // N + edge_steps + sink_steps
    return interior, interior - edge_steps * N, edge_steps, masked, masked + interior_steps


@gluon.jit
def window_step(
    step, first_position, interior, edge, edge_steps, masked, M: gl.constexpr, N: gl.constexpr
):
    """First position of a step's keys, and a flag for sinks."""
    on_edge = step - M // N
    on_sinks = on_edge - edge_steps
    start = gl.where(on_edge < 0, first_position + step * N, edge + on_edge * N)
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
