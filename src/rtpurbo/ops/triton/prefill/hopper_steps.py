"""Which keys a tile of rows meets at which step, as all groups of warps of `hopper_kernel` count them.

M rows of a tile, N keys of a step, made of two blocks where blocks come from a list.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def window_plan(first_row, window, num_sinks, M: gl.constexpr, N: gl.constexpr):
    """Where the parts of a tile's keys begin: (interior, edge, edge and sink steps, all steps).

    Steps are the diagonal, the edge of the window, the sinks (all of these with a mask), then the
    interior, in which every row sees every key.
    """
    all_see_from = gl.maximum(first_row + M - window, num_sinks)
    interior_steps = gl.maximum((first_row - all_see_from) // N, 0)
    interior = first_row - interior_steps * N
    first_seen = gl.maximum(first_row - window + 1, num_sinks)
    edge_steps = (gl.maximum(interior - first_seen, 0) + N - 1) // N
    sink_steps = (num_sinks + N - 1) // N
    masked = M // N + edge_steps + sink_steps
    return interior, interior - edge_steps * N, edge_steps, masked, masked + interior_steps


@gluon.jit
def window_step(
    step, first_row, interior, edge, edge_steps, masked, M: gl.constexpr, N: gl.constexpr
):
    """First position of a step's keys, and whether they are sinks."""
    on_edge = step - M // N
    on_sinks = on_edge - edge_steps
    start = gl.where(on_edge < 0, first_row + step * N, edge + on_edge * N)
    is_sink = (on_sinks >= 0) & (step < masked)
    start = gl.where(is_sink, on_sinks * N, start)
    return gl.where(step >= masked, interior + (step - masked) * N, start), is_sink


@gluon.jit
def listed_step(step, blocks_ptr, num_edge, edge_steps, EDGE: gl.constexpr, BLOCK: gl.constexpr):
    """First positions of a step's two blocks; an empty place lies before every key."""
    entry = gl.where(step < edge_steps, step * 2, EDGE + (step - edge_steps) * 2)
    first = gl.load(blocks_ptr + entry) * BLOCK
    present = (step >= edge_steps) | (entry + 1 < num_edge)
    second = gl.load(blocks_ptr + entry + 1, mask=present, other=-1) * BLOCK
    return first, second
