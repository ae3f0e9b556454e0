"""Keys and values stored as float8 in pages: exactly what the same rounded states in another dtype give."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.triton.decode.fused_append import fused_kv_append
from rtpurbo.ops.triton.headwise import head_tables
from rtpurbo.ops.triton.prefill.portable import PackedQueries, window_attention
from tests.ops.triton.decode.test_fused_append import bits
from tests.ops.triton.decode.test_paged_append import append
from tests.ops.triton.decode_support import Step, paged
from tests.ops.triton.support import DEVICE, DTYPES, ON_GPU

pytestmark = pytest.mark.kernels

FLOAT8 = torch.float8_e4m3fn
RULE = AttentionRule(num_sink_tokens=3, sliding_window=24, block_size=8, min_tokens=8, top_p=0.6)
PARTS = ("full_keys", "full_values", "windowed_keys", "windowed_values")


@pytest.fixture(autouse=True)
def correct_rounding(monkeypatch):
    """Conversions to float8 as on a GPU: the interpreter's own lose carries into the exponent."""
    if ON_GPU:
        return
    interpreter = import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(states, source, target, rounding_mode):
        if target.name != "fp8e4nv" or source.name not in ("fp16", "fp32"):
            return convert(states, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(states)).to(FLOAT8)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def in_float8(pages):
    return replace(pages, keys=pages.keys.to(FLOAT8), values=pages.values.to(FLOAT8))


@pytest.mark.parametrize(
    ("retrieval_heads", "granularity", "dtype"),
    [
        ((1, 2), "token", DTYPES[0]),
        ((0, 1, 2, 3), "block", DTYPES[1]),
        ((), "token", DTYPES[1]),
    ],
    ids=str,
)
def test_decode_step(retrieval_heads, granularity, dtype):
    """Error against fp64 as with other dtypes, and the same bits as with rounded states in the model's dtype."""
    padding = (0, 41)
    rule = replace(RULE, granularity=granularity)
    step = Step.build(120, rule, retrieval_heads, dtype=dtype, padding=padding)
    rounded = {
        name: getattr(step.problem, name).to(FLOAT8).to(dtype) for name in ("keys", "values")
    }
    step.problem = replace(step.problem, **rounded)
    states = step.problem.layered(step.layout, 1)[2:4]
    full, windowed = (
        paged(part, padding, size) for part, size in zip(states, (16, 8), strict=True)
    )
    queries, _, _, *others = step.arguments
    same = step.replaced(arguments=[queries, full, windowed, *others])
    stored = step.replaced(arguments=[queries, in_float8(full), in_float8(windowed), *others])
    stored.check()
    assert torch.equal(stored.run()[0], same.run()[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts(dtype):
    padding, counts = (0, 41), (30, 17)
    step = Step.build(80, RULE, dtype=dtype, padding=padding)
    queries = torch.randn(1, sum(counts), 4, 16, dtype=torch.float64).to(dtype).transpose(1, 2)
    layout = HeadLayout.build((1, 2), 4, 2, DEVICE)
    tables = head_tables(layout, RULE)
    states = step.problem.layered(step.layout, 1)[2:4]

    def attended(convert):
        output = torch.full_like(queries, torch.nan).to(DEVICE)
        sources = [
            (convert(in_float8(paged(part, padding, 16))), tables[name])
            for part, name in zip(states, ("dense_and_local_full", "local_windowed"), strict=True)
        ]
        offsets, numbers = (
            torch.tensor(values, dtype=torch.int32, device=DEVICE)
            for values in ((0, counts[0]), counts)
        )
        starts = sources[0][0].lengths - numbers
        window_attention(
            queries.to(DEVICE), sources, starts, RULE.num_sink_tokens, step.problem.scaling, output,
            None, PackedQueries(offsets, numbers, max(counts)),
        )  # fmt: skip
        return output

    found = attended(lambda pages: pages)
    assert not found.isnan().any()
    same = attended(
        lambda pages: replace(pages, keys=pages.keys.to(dtype), values=pages.values.to(dtype))
    )
    assert torch.equal(found, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.003)], ids=str)
def test_append(dtype, scales):
    """Stored states are those of other pages divided by the scale; values out of range are clamped."""
    static, pages, *_ = append(dtype, norm="weight")
    stored = replace(
        pages,
        **{name: torch.zeros_like(getattr(pages, name), dtype=FLOAT8) for name in PARTS},
        key_scale=scales[0],
        value_scale=scales[1],
    )
    found = fused_kv_append(
        static.queries, static.keys, static.values, None, static.norm, static.projection,
        static.layout, stored,
    )  # fmt: skip
    plain = replace(pages, **{name: torch.zeros_like(getattr(pages, name)) for name in PARTS})
    same = fused_kv_append(
        static.queries, static.keys, static.values, None, static.norm, static.projection,
        static.layout, plain,
    )  # fmt: skip
    assert torch.equal(found[0], same[0])
    assert torch.equal(found[1], same[1])
    assert torch.equal(bits(stored.index_keys), bits(plain.index_keys))
    for name in PARTS:
        scale = scales[name.endswith("values")]
        wanted = (getattr(plain, name).float() * (1 / scale)).clamp(-448, 448)
        assert torch.equal(bits(getattr(stored, name)), bits(wanted.to(FLOAT8))), name
    largest = stored.full_values.float().abs().max()
    assert largest == 448 if scales[1] < 0.01 else largest < 448
