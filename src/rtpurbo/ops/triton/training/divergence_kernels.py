"""Forward KL between heads' attention and their indexers' estimate, with gradients, in two kernels.

With the teacher's logits t = scale * q.k and the student's index scores s, the loss of a query is
sum p (t - s) - lse(t) + lse(s) with p = softmax(t). Its gradient in s is r - p with r = softmax(s), so the gradient
of an index query is the difference of two attentions whose values are the index keys. The first kernel iterates
over keys and accumulates both next to the two softmaxes. The gradient of an index key needs both log-sum-exps:
the second kernel iterates over queries and starts from them. Neither kernel uses atomics.

Near keys whose estimate is the exact logit (s = t) are part of the softmaxes, but do not count for the loss or
its gradients; `ranges` gives the ranges of those keys and the tiles that need masks. Loops over masked tiles are
pipelined like the others although they are short: ptxas 12.8 (Triton 3.6) miscompiles matrix products of a tile
that is always at the same address of shared memory.
Logits are to base 2. The two exponentials per pair and kernel dominate the cost.

T queries, L keys, D head_dim, I index_dim (both padded to powers of two of at least 16);
M queries of a block, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.device_functions import LN_2, LOG2_E, finite_maximum, log_sum_exp

# Log2 of a factor that keeps small probabilities in the range of fp16, in which gradients are multiplied.
LIFT = tl.constexpr(10.0)
# Products of fp32 states on tensor cores, nearly exact; no effect on half precision.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load_tile(descriptor, head, start, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """States [LENGTH, COLUMNS] of one head from `start` on; zero outside the tensor."""
    return descriptor.load([head, start, 0]).reshape([LENGTH, COLUMNS])


@triton.jit
def _update_softmax(peak, total, raw, factor, MASKED: tl.constexpr):
    """Adds scores raw * factor [M, N] to an online softmax: weights, rescaling factor, new peak, new total."""
    new_peak = tl.maximum(peak, tl.max(raw, 1) * factor)
    base = finite_maximum(new_peak) if MASKED else new_peak
    weights = tl.exp2(raw * factor - base[:, None])
    rescale = tl.exp2(peak - base)
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, 1)


@triton.jit
def _add_tile(
    teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
    teacher, student, teacher_factor, student_factor, counted, index_keys,
    MASKED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Adds N keys to both softmaxes, to their weighted sums of index keys, and to the sum of p (t - s)."""
    weights, rescale, teacher_peak, teacher_total = _update_softmax(
        teacher_peak, teacher_total, teacher, teacher_factor, MASKED
    )
    difference = teacher * teacher_factor - student * student_factor
    if MASKED:
        difference = tl.where(counted, difference, 0.0)
    divergence_sum = divergence_sum * rescale + tl.sum(weights * difference, 1)
    if WITH_GRADIENT:
        if MASKED:
            weights = tl.where(counted, weights, 0.0)
        teacher_mean = tl.dot(
            weights.to(index_keys.dtype), index_keys, teacher_mean * rescale[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
    weights, rescale, student_peak, student_total = _update_softmax(
        student_peak, student_total, student, student_factor, MASKED
    )
    if WITH_GRADIENT:
        if MASKED:
            weights = tl.where(counted, weights, 0.0)
        student_mean = tl.dot(
            weights.to(index_keys.dtype), index_keys, student_mean * rescale[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
    return (
        teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
    )  # fmt: skip


@triton.jit
def query_gradient_kernel(
    query_states, key_states, index_queries, index_keys,
    key_value_heads_ptr, query_indices_ptr, starts_ptr, tiles_ptr,
    divergence_ptr, teacher_offsets_ptr, student_offsets_ptr, gradient_ptr,
    T, margin, lag, scale,
    WITH_GRADIENT: tl.constexpr, STAGES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exps minus LIFT, and index query gradients of one query block of one head."""
    # One head after the other, query blocks with most keys first: programs that run at the same time read the
    # same keys, which would not fit in the L2 cache otherwise.
    tiles = tl.cdiv(T, M)
    head, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    key_value_head = tl.load(key_value_heads_ptr + head)
    query_numbers = tile * M + tl.arange(0, M)
    in_call = query_numbers < T
    query_indices = tl.load(query_indices_ptr + query_numbers, mask=in_call, other=-1)
    starts = tl.load(starts_ptr + query_numbers, mask=in_call, other=0)
    tiles_ptr += tile * 6
    begin, far_from, far_to = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    near_from, near_to, end = tl.load(tiles_ptr + 3), tl.load(tiles_ptr + 4), tl.load(tiles_ptr + 5)

    queries = _load_tile(query_states, head, tile * M, M, D)
    queries_of_index = _load_tile(index_queries, head, tile * M, M, I)
    teacher_peak = tl.full([M], float("-inf"), tl.float32)
    teacher_total = tl.zeros([M], tl.float32)
    teacher_mean = tl.zeros([M, I], tl.float32)
    student_mean = tl.zeros([M, I], tl.float32)
    divergence_sum = tl.zeros([M], tl.float32)

    for start in tl.range(near_from, near_to, N, num_stages=STAGES):
        keys = _load_tile(key_states, key_value_head, start, N, D)
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION)
        _, _, teacher_peak, teacher_total = _update_softmax(
            teacher_peak, teacher_total, teacher, scale, False
        )
    # For these keys, student and teacher are equal.
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
        visible = (columns[None, :] >= starts[:, None]) & (
            columns[None, :] <= query_indices[:, None]
        )
        counted = (columns[None, :] >= (starts + margin)[:, None]) & (
            columns[None, :] <= (query_indices - lag)[:, None]
        )
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
        teacher = tl.where(visible, teacher, float("-inf"))
        student = tl.dot(queries_of_index, keys_of_index.T, input_precision=PRECISION) * LOG2_E
        student = tl.where(counted, student, teacher)
        (
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
        ) = _add_tile(
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
            teacher, student, 1.0, 1.0, counted, keys_of_index, True, WITH_GRADIENT,
        )  # fmt: skip
    for start in tl.range(far_from, far_to, N, num_stages=STAGES):
        keys = _load_tile(key_states, key_value_head, start, N, D)
        keys_of_index = _load_tile(index_keys, head, start, N, I)
        student = tl.dot(queries_of_index, keys_of_index.T, input_precision=PRECISION)
        teacher = tl.dot(queries, keys.T, input_precision=PRECISION)
        (
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
        ) = _add_tile(
            teacher_peak, teacher_total, teacher_mean, student_peak, student_total, student_mean, divergence_sum,
            teacher, student, scale, LOG2_E, None, keys_of_index, False, WITH_GRADIENT,
        )  # fmt: skip

    offsets = head.to(tl.int64) * T + query_numbers
    teacher_sum, student_sum = (
        log_sum_exp(teacher_peak, teacher_total),
        log_sum_exp(student_peak, student_total),
    )
    teacher_total = tl.where(teacher_total == 0.0, 1.0, teacher_total)
    student_total = tl.where(student_total == 0.0, 1.0, student_total)
    divergence = (divergence_sum / teacher_total - teacher_sum + student_sum) * LN_2
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
    keys, keys_of_index, head, first_query, T, scale,
    M: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Gradient of the losses of M queries in the index scores of N keys, [N, M], times 2 ** LIFT."""
    query_numbers = first_query + tl.arange(0, M)
    queries = _load_tile(query_states, head, first_query, M, D)
    queries_of_index = _load_tile(index_queries, head, first_query, M, I)
    teacher_offsets = tl.load(
        teacher_offsets_ptr + query_numbers, mask=query_numbers < T, other=float("inf")
    )
    student_offsets = tl.load(
        student_offsets_ptr + query_numbers, mask=query_numbers < T, other=float("inf")
    )
    student = tl.dot(keys_of_index, queries_of_index.T, input_precision=PRECISION)
    teacher = tl.dot(keys, queries.T, input_precision=PRECISION)
    return tl.exp2(student * LOG2_E - student_offsets[None, :]) - tl.exp2(
        teacher * scale - teacher_offsets[None, :]
    )


@triton.jit
def key_gradient_kernel(
    query_states, key_states, index_queries, weighted_index_queries, index_keys,
    key_value_heads_ptr, query_indices_ptr, starts_ptr, tiles_ptr, teacher_offsets_ptr, student_offsets_ptr,
    gradient_ptr,
    T, L, margin, lag, scale,
    STAGES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of index keys of one head; weights of the losses are in the weighted index queries."""
    # The first keys are visible to most queries.
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
        first_query = first + i * M
        if i >= head_tiles:
            first_query = whole_to + (i - head_tiles) * M
        gradient = _lifted_gradient(
            query_states, index_queries, teacher_offsets_ptr, student_offsets_ptr,
            keys, keys_of_index, head, first_query, T, scale, M, D, I,
        )  # fmt: skip
        query_numbers = first_query + tl.arange(0, M)
        in_call = query_numbers < T
        lowest = tl.load(starts_ptr + query_numbers, mask=in_call, other=0) + margin
        highest = tl.load(query_indices_ptr + query_numbers, mask=in_call, other=-1) - lag
        counted = (columns[:, None] >= lowest[None, :]) & (columns[:, None] <= highest[None, :])
        # Exponentials of keys after the query may be infinite.
        gradient = tl.where(counted, gradient, 0.0)
        weighted = _load_tile(weighted_index_queries, head, first_query, M, I)
        accumulator = tl.dot(
            gradient.to(weighted.dtype), weighted, accumulator, input_precision=PRECISION
        )
    for first_query in tl.range(whole_from, whole_to, M, num_stages=STAGES):
        gradient = _lifted_gradient(
            query_states, index_queries, teacher_offsets_ptr, student_offsets_ptr,
            keys, keys_of_index, head, first_query, T, scale, M, D, I,
        )  # fmt: skip
        weighted = _load_tile(weighted_index_queries, head, first_query, M, I)
        accumulator = tl.dot(
            gradient.to(weighted.dtype), weighted, accumulator, input_precision=PRECISION
        )
    dims = tl.arange(0, I)
    offsets = (head.to(tl.int64) * L + columns)[:, None] * I + dims[None, :]
    tl.store(gradient_ptr + offsets, accumulator, mask=(columns < L)[:, None])
