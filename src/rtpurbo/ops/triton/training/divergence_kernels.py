"""Forward KL between heads' attention and their indexers' estimate, with gradients, in two sweeps.

The teacher's logits are t = scale q.k, the student's s the index scores; each row's loss is
sum p (t - s) - lse(t) + lse(s), where p = softmax(t) and, with r = softmax(s), its gradient in s is r - p.
So what a row's index query gets is the difference of two attentions over the index keys, as values:
the first sweep, over keys, adds up both beside the two softmaxes. What an index key gets needs the
log-sum-exps: the second sweep, over rows, begins with them. No gradient is added up by atomics.

Near keys that the reading takes from the teacher (s = t) take part in the softmaxes, but count
neither for the loss nor for gradients; `tiles` says which keys those are and where masks are needed.
Loops over such tiles load ahead like the others, though they are short: a tile that always lies at the same
address of shared memory is what ptxas 12.8, which comes with Triton 3.6, can multiply from a wrong one.
All logits are in powers of two. Two exponentials a pair and sweep are most of the work, so nothing
else that costs as much is done for a pair.

T query rows, L keys, D head_dim, I index_dim (both padded to powers of two of at least 16);
M query rows of a tile, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.softmax import LN_2, LOG2_E, log_sum_exp, measured_from

# Log2 of a factor that lifts small probabilities into the range of fp16, where gradients are multiplied.
LIFT = tl.constexpr(10.0)
# Of fp32 states: nearly exact, yet by tensor cores. Half precision knows but one.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load_tile(descriptor, head, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of one head; zero outside the tensor."""
    return descriptor.load([head, start, 0]).reshape([ROWS, COLUMNS])


@triton.jit
def _fold(peak, total, raw, factor, MASKED: tl.constexpr):
    """A softmax of M rows that grows by raw * factor [M, N]: weights, what shrinks, new peak, new total."""
    new_peak = tl.maximum(peak, tl.max(raw, 1) * factor)
    base = measured_from(new_peak) if MASKED else new_peak
    weights = tl.exp2(raw * factor - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def _add_tile(
    teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
    teacher, student, teacher_factor, student_factor, counted, index_keys,
    MASKED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Adds N keys to both softmaxes, to what they average over the index keys, and to sum p (t - s)."""
    weights, shrink, teacher_peak, teacher_total = _fold(
        teacher_peak, teacher_total, teacher, teacher_factor, MASKED
    )
    difference = teacher * teacher_factor - student * student_factor
    if MASKED:
        difference = tl.where(counted, difference, 0.0)
    gap = gap * shrink + tl.sum(weights * difference, 1)
    if WITH_GRADIENT:
        if MASKED:
            weights = tl.where(counted, weights, 0.0)
        teacher_mean = tl.dot(
            weights.to(index_keys.dtype), index_keys, teacher_mean * shrink[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
    weights, shrink, student_peak, student_total = _fold(
        student_peak, student_total, student, student_factor, MASKED
    )
    if WITH_GRADIENT:
        if MASKED:
            weights = tl.where(counted, weights, 0.0)
        student_mean = tl.dot(
            weights.to(index_keys.dtype), index_keys, student_mean * shrink[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
    return (
        teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
    )  # fmt: skip


@triton.jit
def rows_kernel(
    query_states, key_states, index_queries, index_keys,
    key_value_heads_ptr, places_ptr, starts_ptr, tiles_ptr,
    divergence_ptr, teacher_offsets_ptr, student_offsets_ptr, gradient_ptr,
    T, margin, lag, scale,
    WITH_GRADIENT: tl.constexpr, STAGES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exps less the lift, and gradients of the index queries, of one tile of rows of one head."""
    # One head after the other, long tiles first: programs that begin together walk through the same keys
    # together, which otherwise would not fit in the L2 cache.
    tiles = tl.cdiv(T, M)
    head, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    key_value_head = tl.load(key_value_heads_ptr + head)
    rows = tile * M + tl.arange(0, M)
    in_call = rows < T
    places = tl.load(places_ptr + rows, mask=in_call, other=-1)
    starts = tl.load(starts_ptr + rows, mask=in_call, other=0)
    tiles_ptr += tile * 6
    begin, far_from, far_to = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    near_from, near_to, end = tl.load(tiles_ptr + 3), tl.load(tiles_ptr + 4), tl.load(tiles_ptr + 5)

    queries = _load_tile(query_states, head, tile * M, M, D)
    queries_of_index = _load_tile(index_queries, head, tile * M, M, I)
    teacher_peak = tl.full([M], float("-inf"), tl.float32)
    teacher_total = tl.zeros([M], tl.float32)
    teacher_mean = tl.zeros([M, I], tl.float32)
    student_mean = tl.zeros([M, I], tl.float32)
    gap = tl.zeros([M], tl.float32)

    for start in tl.range(near_from, near_to, N, num_stages=STAGES):
        keys = _load_tile(key_states, key_value_head, start, N, D)
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION)
        _, _, teacher_peak, teacher_total = _fold(
            teacher_peak, teacher_total, teacher, scale, False
        )
    # So far both see the same.
    student_peak, student_total = teacher_peak, teacher_total

    head_tiles = (far_from - begin) // N
    edge_tiles = (near_from - far_to) // N
    for i in tl.range(0, head_tiles + edge_tiles + tl.cdiv(end - near_to, N), num_stages=STAGES):
        start = begin + i * N
        if i >= head_tiles:
            start = far_to + (i - head_tiles) * N
        if i >= head_tiles + edge_tiles:
            start = near_to + (i - head_tiles - edge_tiles) * N
        keys = _load_tile(key_states, key_value_head, start, N, D)
        keys_of_index = _load_tile(index_keys, head, start, N, I)
        columns = start + tl.arange(0, N)
        visible = (columns[None, :] >= starts[:, None]) & (columns[None, :] <= places[:, None])
        counted = (columns[None, :] >= (starts + margin)[:, None]) & (
            columns[None, :] <= (places - lag)[:, None]
        )
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
        teacher = tl.where(visible, teacher, float("-inf"))
        student = tl.dot(queries_of_index, keys_of_index.T, input_precision=PRECISION) * LOG2_E
        student = tl.where(counted, student, teacher)
        (
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
        ) = _add_tile(
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
            teacher, student, 1.0, 1.0, counted, keys_of_index, True, WITH_GRADIENT,
        )  # fmt: skip
    for start in tl.range(far_from, far_to, N, num_stages=STAGES):
        keys = _load_tile(key_states, key_value_head, start, N, D)
        keys_of_index = _load_tile(index_keys, head, start, N, I)
        student = tl.dot(queries_of_index, keys_of_index.T, input_precision=PRECISION)
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION)
        (
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
        ) = _add_tile(
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, gap,
            teacher, student, scale, LOG2_E, None, keys_of_index, False, WITH_GRADIENT,
        )  # fmt: skip

    offsets = head.to(tl.int64) * T + rows
    teacher_sum, student_sum = (
        log_sum_exp(teacher_peak, teacher_total),
        log_sum_exp(student_peak, student_total),
    )
    teacher_total = tl.where(teacher_total == 0.0, 1.0, teacher_total)
    student_total = tl.where(student_total == 0.0, 1.0, student_total)
    divergence = (gap / teacher_total - teacher_sum + student_sum) * LN_2
    tl.store(divergence_ptr + offsets, divergence, mask=in_call)
    if WITH_GRADIENT:
        tl.store(teacher_offsets_ptr + offsets, teacher_sum - LIFT, mask=in_call)
        tl.store(student_offsets_ptr + offsets, student_sum - LIFT, mask=in_call)
        gradient = student_mean / student_total[:, None] - teacher_mean / teacher_total[:, None]
        dims = tl.arange(0, I)
        tl.store(
            gradient_ptr + offsets[:, None] * I + dims[None, :], gradient, mask=in_call[:, None]
        )


@triton.jit
def _lifted_gradient(
    query_states, index_queries, teacher_offsets_ptr, student_offsets_ptr,
    keys, keys_of_index, head, first_row, T, scale,
    M: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Gradient of M rows' losses in the index scores of N keys, [N, M], times two to the lift."""
    rows = first_row + tl.arange(0, M)
    queries = _load_tile(query_states, head, first_row, M, D)
    queries_of_index = _load_tile(index_queries, head, first_row, M, I)
    teacher_offsets = tl.load(teacher_offsets_ptr + rows, mask=rows < T, other=float("inf"))
    student_offsets = tl.load(student_offsets_ptr + rows, mask=rows < T, other=float("inf"))
    student = tl.dot(keys_of_index, queries_of_index.T, input_precision=PRECISION)
    teacher = tl.dot(keys, queries.T, input_precision=PRECISION)
    return tl.exp2(student * LOG2_E - student_offsets[None, :]) - tl.exp2(
        teacher * scale - teacher_offsets[None, :]
    )


@triton.jit
def columns_kernel(
    query_states, key_states, index_queries, weighted_index_queries, index_keys,
    key_value_heads_ptr, places_ptr, starts_ptr, tiles_ptr, teacher_offsets_ptr, student_offsets_ptr,
    gradient_ptr,
    T, L, margin, lag, scale,
    STAGES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of index keys of one head, where a row's loss counts by its weighted index query."""
    # The first keys are seen by most rows.
    tiles = tl.cdiv(L, N)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    key_value_head = tl.load(key_value_heads_ptr + head)
    tiles_ptr += tile * 4
    first, whole_from = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    whole_to, end = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    teacher_offsets_ptr += head.to(tl.int64) * T
    student_offsets_ptr += head.to(tl.int64) * T

    keys = _load_tile(key_states, key_value_head, tile * N, N, D)
    keys_of_index = _load_tile(index_keys, head, tile * N, N, I)
    columns = tile * N + tl.arange(0, N)
    accumulator = tl.zeros([N, I], tl.float32)
    head_tiles = tl.cdiv(whole_from - first, M)
    for i in tl.range(0, head_tiles + tl.cdiv(end - whole_to, M), num_stages=STAGES):
        row = first + i * M
        if i >= head_tiles:
            row = whole_to + (i - head_tiles) * M
        gradient = _lifted_gradient(
            query_states, index_queries, teacher_offsets_ptr, student_offsets_ptr,
            keys, keys_of_index, head, row, T, scale, M, D, I,
        )  # fmt: skip
        rows = row + tl.arange(0, M)
        in_call = rows < T
        lowest = tl.load(starts_ptr + rows, mask=in_call, other=0) + margin
        highest = tl.load(places_ptr + rows, mask=in_call, other=-1) - lag
        counted = (columns[:, None] >= lowest[None, :]) & (columns[:, None] <= highest[None, :])
        # Exponentials of later keys may be infinite.
        gradient = tl.where(counted, gradient, 0.0)
        weighted = _load_tile(weighted_index_queries, head, row, M, I)
        accumulator = tl.dot(
            gradient.to(weighted.dtype), weighted, accumulator, input_precision=PRECISION
        )
    for row in tl.range(whole_from, whole_to, M, num_stages=STAGES):
        gradient = _lifted_gradient(
            query_states, index_queries, teacher_offsets_ptr, student_offsets_ptr,
            keys, keys_of_index, head, row, T, scale, M, D, I,
        )  # fmt: skip
        weighted = _load_tile(weighted_index_queries, head, row, M, I)
        accumulator = tl.dot(
            gradient.to(weighted.dtype), weighted, accumulator, input_precision=PRECISION
        )
    dims = tl.arange(0, I)
    offsets = (head.to(tl.int64) * L + columns)[:, None] * I + dims[None, :]
    tl.store(gradient_ptr + offsets, accumulator, mask=(columns < L)[:, None])
