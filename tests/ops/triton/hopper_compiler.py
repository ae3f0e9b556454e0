"""Compiles all kernels for an H100, on a machine without a GPU; a script that `test_compiles` runs.

A stand-in for the CUDA driver reports the GPU, so that kernels are compiled for exactly the arguments of their
launches. The compiler rejects code that the interpreter accepts.
"""

import re
import subprocess
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates
from rtpurbo.ops.states import AttentionCall, PagedStates
from rtpurbo.ops.triton.decode import pdl, window_and_scores
from rtpurbo.ops.triton.decode.attention import decode_step
from rtpurbo.ops.triton.decode.fused_append import (
    AppendSlots,
    HeadNorm,
    IndexProjection,
    PagedSlots,
    RotaryTable,
    fused_kv_append,
)
from rtpurbo.ops.triton.headwise import head_tables, prefill_attention
from rtpurbo.ops.triton.prefill import hopper, portable
from rtpurbo.ops.triton.sets import top_k, top_set
from rtpurbo.ops.triton.training.divergence import indexer_divergence
from tests.ops.triton.hopper_code import strange_descriptors

# Bytes per thread: one or two registers may spill where two programs share a multiprocessor.
MOST_STACK = 16
# The loss of stage 1 spills a few more around the loop over tiles that need a mask, which is short. Portable prefill
# spills under its own limit of 128 registers, by which two programs share a multiprocessor: found, not tuned.
MOST_STACK_OF = {"query_gradient_kernel": 48, "window_kernel": 48, "block_sparse_kernel": 120}
# The loss of stage 1 multiplies float32 as three products of TF32, which is as exact as float32.
USE_TF32 = ("query_gradient_kernel", "key_gradient_kernel")


class AbsentHopper:
    """The part of a driver that compilation needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(run_kernel):
    """Replaces launches by compilations, and checks the results."""

    def run(self, *arguments, grid, warmup, **options):
        kernel = run_kernel(self, *arguments, grid=grid, warmup=True, **options)
        check(self.__name__, kernel.asm)
        return kernel

    return run


def check(name, code):
    """Checks registers, matrix descriptors, and that no histogram counts elements replicated over threads twice."""
    for operand in re.findall(r"= tt.histogram .* : (.*) ->", code["ttgir"]):
        assert "slice" not in operand, f"{name} counts {operand}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        dump = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        disassemble = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    strange = strange_descriptors(listing)
    assert not strange, f"{name} has wrong matrix descriptors: {strange}"
    assert name in USE_TF32 or "tf32" not in code["ptx"], f"{name} multiplies float32 as TF32"
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    # fp32 products do not run on tensor cores and need more registers than there are.
    fits = stack <= MOST_STACK_OF.get(name, MOST_STACK)
    fits |= bool(re.search(r"%quer\w+: !tt\.(ptr<f32>|tensordesc<.*?xf32\b)", code["ttgir"]))
    assert fits, f"{name} spills: {usage}"
    if name == "block_maxima_kernel" and "f16" in code["ttgir"]:
        assert "max.f16x2" in code["ptx"], f"{name} computes maxima one by one"


def loss(head_dim, index_dim, dtype=torch.bfloat16, *, length=4096, **rule):
    """Compiles the kernels of the loss of stage 1 and of its backward pass."""
    heads = 5
    index_queries, index_keys = (
        torch.empty(heads, length, index_dim, requires_grad=True) for _ in range(2)
    )
    losses = indexer_divergence(
        torch.empty(heads, length, head_dim, dtype=dtype),
        torch.empty(2, length, head_dim, dtype=dtype),
        torch.zeros(heads, dtype=torch.int64),
        index_queries,
        index_keys,
        torch.arange(length),
        torch.zeros(length, dtype=torch.int64),
        AttentionRule(**rule),
        scaling=head_dim**-0.5,
    )
    losses.backward(torch.ones_like(losses))


def step(
    heads,
    key_value_heads,
    retrieval_heads,
    *,
    capacity=20000,
    window=1024,
    head_dim=128,
    index_dim=16,
    dtype=torch.bfloat16,
    index_dtype=torch.float16,
    cache_dtype=None,
    batch=2,
    page_size=0,
    windowed_page_size=0,
    shared_keys=False,
    **rule,
):
    """Compiles the kernels of a decode step of this shape."""
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    full, ranks = len(layout.full_key_value_heads), len(retrieval_heads)
    index_keys = full if shared_keys else ranks

    def states(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype)

    if page_size:
        pages = capacity // page_size
        full_states = PagedStates(
            states(pages, full, page_size, head_dim, dtype=cache_dtype or dtype),
            states(pages, full, page_size, head_dim, dtype=cache_dtype or dtype),
            torch.zeros(batch, pages, dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int32),
            states(pages, index_keys, page_size, index_dim, dtype=index_dtype),
        )
    else:
        full_states = KeyValueStates(
            states(batch, full, capacity, head_dim),
            states(batch, full, capacity, head_dim),
            torch.zeros(batch, capacity, dtype=torch.int64),
            states(batch, index_keys, capacity, index_dim, dtype=index_dtype),
            first_slots=torch.zeros(batch, dtype=torch.int32),
            length=torch.zeros(1, dtype=torch.int32),
        )
    ring = states(batch, key_value_heads - full, window + 9, head_dim)
    windowed = KeyValueStates(ring, ring, torch.zeros(batch, window + 9, dtype=torch.int64))
    if windowed_page_size:
        shape = (capacity, key_value_heads - full, windowed_page_size, head_dim)
        pages = states(*shape, dtype=cache_dtype or dtype)
        table = torch.zeros(batch, capacity // windowed_page_size, dtype=torch.int32)
        windowed = PagedStates(pages, pages, table, full_states.lengths)
    decode_step(
        states(batch, heads, 1, head_dim),
        full_states,
        windowed,
        layout,
        states(batch, ranks, 1, index_dim, dtype=torch.float16) if ranks else None,
        AttentionRule(sliding_window=window, **rule),
        head_dim**-0.5,
        None,
        True,
    )


def fused_append(
    heads,
    key_value_heads,
    retrieval_heads,
    *,
    head_dim=128,
    rotary_dim=128,
    index_dim=16,
    num_features=128,
    dtype=torch.bfloat16,
    index_dtype=torch.float16,
    norm=None,
    rotated=True,
    batch=2,
    shared_keys=False,
):
    """Compiles the fused append of one token; `norm`: `unit_offset` of its QK-norm, or None without one."""
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    full, ranks = len(layout.full_key_value_heads), len(retrieval_heads)
    index_keys = full if shared_keys else ranks

    def states(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype)

    weight, angles = states(head_dim), states(1, 1, rotary_dim)
    index_weights = [
        states(count, index_dim, num_features, dtype=torch.float32) for count in (ranks, index_keys)
    ]
    dims = torch.zeros(num_features, dtype=torch.int64)
    kept, ring = (states(batch, count, 4096, head_dim) for count in (full, key_value_heads - full))
    fused_kv_append(
        states(batch, heads, 1, head_dim),
        states(batch, key_value_heads, 1, head_dim),
        states(batch, key_value_heads, 1, head_dim),
        (angles, angles) if rotary_dim else None,
        None if norm is None else HeadNorm(weight, weight, 1e-6, norm),
        IndexProjection(*index_weights, dims, rotated) if ranks else None,
        layout,
        AppendSlots(
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(batch, 1, dtype=torch.int64),
            kept,
            kept,
            ring,
            ring,
            states(batch, index_keys, 4096, index_dim, dtype=index_dtype) if ranks else None,
        ),
    )


def paged_append(
    heads,
    key_value_heads,
    retrieval_heads,
    *,
    head_dim=128,
    dtype=torch.bfloat16,
    table_dtype=torch.bfloat16,
    index_dtype=torch.float16,
    cache_dtype=None,
    page_sizes=(16, 64),
    norm=False,
    rotated=True,
    uniform=True,
    shared_keys=False,
):
    """Compiles the fused append of tokens to pages."""
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    full, ranks, tokens = len(layout.full_key_value_heads), len(retrieval_heads), 3
    index_keys = full if shared_keys else ranks
    kept, windowed = (
        torch.empty(50, count, size, head_dim, dtype=cache_dtype or dtype)
        for count, size in zip((full, key_value_heads - full), page_sizes, strict=True)
    )
    states = torch.empty(tokens, heads + 2 * key_value_heads, 1, head_dim, dtype=dtype)
    weight = torch.empty(head_dim, dtype=dtype)
    query_weight, key_weight = (torch.empty(count, 16, head_dim) for count in (ranks, index_keys))
    numbers = torch.zeros(tokens, dtype=torch.int64)
    lengths = torch.zeros(tokens, dtype=torch.int32) if uniform else None
    fused_kv_append(
        *states.split([heads, key_value_heads, key_value_heads], 1),
        RotaryTable(torch.empty(4096, head_dim, dtype=table_dtype), numbers),
        HeadNorm(weight, weight, 1e-6) if norm else None,
        IndexProjection(query_weight, key_weight, torch.arange(head_dim), rotated)
        if ranks
        else None,
        layout,
        PagedSlots(
            numbers,
            numbers,
            kept,
            kept,
            windowed,
            windowed,
            torch.empty(50, index_keys, page_sizes[0], 16, dtype=index_dtype) if ranks else None,
            lengths,
            lengths,
        ),
    )


def packed_prompts(
    head_dim,
    page_sizes,
    dtype=torch.bfloat16,
    cache_dtype=None,
    kernels=portable,
    log_sum_exp=False,
):
    """Compiles a prefill kernel for packed queries and pages of full and windowed KV heads."""
    layout = HeadLayout.build((0, 9), 32, 4)
    numbers = torch.zeros(3, dtype=torch.int32)
    tables = head_tables(layout, AttentionRule())
    sources = []
    for page_size, name in zip(
        page_sizes, ("dense_and_local_full", "local_windowed"), strict=False
    ):
        pages = torch.empty(50, 2, page_size, head_dim, dtype=cache_dtype or dtype)
        table = torch.zeros(3, 20, dtype=torch.int32)
        sources.append((PagedStates(pages, pages, table, numbers), tables[name]))
    queries, output = (
        torch.empty(1, 300, 32, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2)
    )
    sums = torch.empty(1, 32, 304) if log_sum_exp else None
    packed = portable.PackedQueries(numbers, numbers, 200)
    kernels.window_attention(queries, sources, numbers, 4, 0.1, output, sums, packed)


def prompt(
    retrieval_heads,
    *,
    heads=32,
    key_value_heads=4,
    head_dim=128,
    dtype=torch.bfloat16,
    batch=2,
    padded=False,
    for_hopper=True,
    log_sum_exp=False,
    shared_keys=False,
    **rule,
):
    """Compiles the prefill kernels for the last 300 tokens of a prompt."""
    hopper.is_hopper = lambda: for_hopper
    length, q_len = 4096, 300
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    rule = AttentionRule(sliding_window=1024, **rule)
    slots = torch.zeros(batch, dtype=torch.int32) if padded else None

    def states(count, index=None):
        keys = torch.empty(batch, count, length, head_dim, dtype=dtype)
        positions = torch.zeros(batch, length, dtype=torch.int64)
        return KeyValueStates(keys, keys, positions, index, not padded, slots, slots)

    num_keys = len(layout.full_key_value_heads if shared_keys else retrieval_heads)
    index_keys = torch.empty(batch, num_keys, length, 16, dtype=torch.float16)
    full = states(len(layout.full_key_value_heads), index_keys)
    selecting = rule.num_selecting_queries(q_len)
    call = AttentionCall(
        torch.empty(batch, heads, q_len, head_dim, dtype=dtype),
        full.positions[:, -q_len:],
        full,
        states(key_value_heads - len(layout.full_key_value_heads)),
        layout,
        torch.empty(batch, len(retrieval_heads), q_len, 16, dtype=torch.float16)
        if selecting
        else None,
        rule,
        head_dim**-0.5,
        return_log_sum_exp=log_sum_exp,
    )
    prefill_attention(call)


def compile_prompts():
    """Compiles prefill with both kernels, with all arguments that change the compiled code."""
    sparse = {"prefill_mode": "row_peak"}
    for head_dim in (64, 128):
        for padded in (False, True):
            for rule in ({}, sparse):
                prompt((0, 9), head_dim=head_dim, padded=padded, **rule)
    prompt((0, 9), dtype=torch.float16, log_sum_exp=True)
    for rule in ({}, sparse):
        prompt((0, 9), batch=1, **rule)
    prompt((0, 9), row_stride=4, retrieval_window=64, **sparse)
    for head_dim in (64, 96, 128, 256):
        prompt((0, 9), head_dim=head_dim, for_hopper=False, log_sum_exp=True)
    prompt((0, 9), for_hopper=False, padded=True, **sparse)
    prompt((0,), heads=6, key_value_heads=2, head_dim=64, for_hopper=False, block_size=32, **sparse)
    prompt((0, 9, 10), shared_keys=True, **sparse)


def compile_float32():
    """Compiles the attention kernels with matrix products for float32 states."""
    options = {"dtype": torch.float32, "for_hopper": False, "head_dim": 16}
    prompt((0, 9), prefill_mode="row_peak", **options)
    step(8, 4, (0, 1), dtype=torch.float32, head_dim=16, page_size=16)


def compile_losses():
    """Compiles the loss of stage 1; sizes divisible by 16 are specialised."""
    for index_dim in (4, 32):
        for head_dim in (64, 128):
            loss(head_dim, index_dim)
            loss(head_dim, index_dim, length=2030, reading="paper")
    loss(96, 16, torch.float16, length=2030)
    loss(64, 16, torch.float32)


def compile_fused_appends():
    """Compiles the fused append for several model families."""
    fused_append(32, 8, (0, 9))
    fused_append(32, 8, (0, 9), norm=False, rotated=False, num_features=40, batch=1)
    fused_append(32, 8, (0, 9), norm=False, index_dtype=torch.float8_e4m3fn)
    fused_append(12, 2, range(6), norm=False, index_dtype=torch.float8_e4m3fn, shared_keys=True)
    fused_append(
        8, 4, (0,), norm=True, head_dim=256, rotary_dim=256, index_dim=64, num_features=256
    )
    fused_append(32, 32, (3,), head_dim=96, rotary_dim=72, dtype=torch.float16, num_features=96)
    fused_append(16, 4, (), rotary_dim=0)
    fused_append(16, 4, (1,), rotary_dim=0, dtype=torch.float32, index_dtype=torch.float32)
    fused_append(1, 1, (0,), index_dim=1, num_features=1, batch=1)


def compile_pages():
    """Compiles the Hopper kernel for pages of all sizes."""
    for page_sizes in ((16, 64), (128, 32), (64,)):
        packed_prompts(128, page_sizes, kernels=hopper)
    packed_prompts(64, (32, 128), kernels=hopper, log_sum_exp=True)


def compile_serving():
    """Compiles the kernels for the caches of vLLM."""
    paged_append(32, 8, (0, 9))
    paged_append(32, 8, (0, 9), norm=True, rotated=False, uniform=False, page_sizes=(64, 16))
    paged_append(32, 8, (0, 9), index_dtype=torch.float8_e4m3fn, table_dtype=torch.float32)
    paged_append(32, 8, range(9), shared_keys=True, index_dtype=torch.float8_e4m3fn)
    paged_append(12, 2, (), head_dim=64, dtype=torch.float16)
    paged_append(8, 8, (1,), dtype=torch.float32, index_dtype=torch.float32)
    packed_prompts(128, (16, 16))
    packed_prompts(64, (64, 64), torch.float16)
    compile_pages()
    step(32, 8, (0, 9), page_size=64, windowed_page_size=16)
    step(12, 2, (), head_dim=64, page_size=16, windowed_page_size=16)
    step(8, 4, (0, 1), dtype=torch.float32, page_size=16, windowed_page_size=64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        options = {"dtype": dtype, "cache_dtype": torch.float8_e4m3fn}
        paged_append(32, 8, (0, 9), norm=True, **options)
        for head_dim in (64, 128):
            packed_prompts(head_dim, (16, 16), **options)
            step(32, 8, (0, 9), head_dim=head_dim, page_size=64, windowed_page_size=16, **options)


def compile_groups():
    """Compiles steps in which several heads of a KV head retrieve."""
    long = {"capacity": 32768, "window": 4096, "num_sink_tokens": 128}
    for granularity in ("token", "block"):
        options = {"shared_keys": True, "index_dim": 32, "granularity": granularity, **long}
        step(12, 2, range(6), index_dtype=torch.float8_e4m3fn, **options)
        step(12, 2, (0, *range(6, 12)), reading="paper", **options)
        step(12, 2, range(6), batch=16, page_size=16, windowed_page_size=64, **options)
    step(8, 1, range(7), capacity=2**20, window=8192)
    step(16, 1, range(16), shared_keys=True, head_dim=64, index_dim=1)
    step(20, 1, range(18), shared_keys=True, index_dim=64)
    step(8, 2, range(8), head_dim=256, dtype=torch.float16)
    step(8, 2, range(8), head_dim=96, shared_keys=True, reading="far", batch=1)
    step(8, 2, range(3), shared_keys=True, dtype=torch.float32, index_dtype=torch.float32)
    float8 = {"cache_dtype": torch.float8_e4m3fn, "page_size": 64, "windowed_page_size": 16}
    step(32, 8, range(9), index_dtype=torch.float8_e4m3fn, shared_keys=True, **float8)


def replace_launches():
    """Replaces the driver by the stand-in, and launches by compilations."""
    driver.set_active(AbsentHopper())
    pdl.supports_pdl = window_and_scores.supports_pdl = lambda device: True
    JITFunction.run = compile_only(JITFunction.run)


def main():
    """Compiles shapes that take different paths through the kernels."""
    replace_launches()
    compile_float32()
    compile_prompts()
    compile_losses()
    compile_fused_appends()
    compile_serving()
    for entries in (83, 8192, 40000):
        top_set(torch.empty(2, entries), torch.empty(2))
        top_k(torch.empty(2, entries), 128)
    single = {"capacity": 16, "batch": 1, "window": 64, "head_dim": 64, "index_dim": 1}
    for reading in ("residual", "far", "paper"):
        for granularity in ("token", "block"):
            rule = {"reading": reading, "granularity": granularity}
            step(32, 4, (0, 9), **rule)
            # Sizes of 1 become constants, unless a kernel says otherwise.
            step(1, 1, (0,), num_sink_tokens=1, retrieval_window=1, min_tokens=1, **single, **rule)
    step(32, 4, ())
    step(6, 2, (0, 1), top_p=1.0, head_dim=96, dtype=torch.float16)
    step(40, 1, (3,), head_dim=256, index_dim=64, dtype=torch.float32)
    step(8, 8, (1,), page_size=16)
    step(32, 4, (0, 9), index_dtype=torch.float8_e4m3fn)
    step(12, 2, range(6), index_dtype=torch.float8_e4m3fn, shared_keys=True)
    step(12, 2, (0, 6, 7), page_size=16, shared_keys=True, reading="paper")
    compile_groups()
    step(1, 1, (0,), page_size=16, reading="paper", **single)


if __name__ == "__main__":
    main()
