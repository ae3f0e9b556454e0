"""Layers with a sliding window of their own, which are not converted."""

from functools import partial

import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, eager_attention_forward

from rtpurbo.models.attention import key_positions_as_mask, sparse_attention
from rtpurbo.models.slots import WindowedPositions
from rtpurbo.ops import api
from tests.tiny_models import any_model

BATCH, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 3, 6, 3, 16, 8
# Tokens of a prompt, of a chunk after it, and of decode steps.
ENDS = (29, 39, 40, 41)
PADDING = {"none": (), "left": (5, 0, 30), "between": (5, 0, 2)}


@pytest.fixture
def module():
    """An attention module that has both a window and learned sinks."""
    model = any_model("gpt_oss", sliding_window=WINDOW)
    return next(part for part in model.modules() if isinstance(part, GptOssAttention))


def mask_of(kind):
    """Mask of all tokens; None without padding."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, ENDS[-1], dtype=torch.bool)
    for row, padding in enumerate(PADDING[kind]):
        mask[row, :padding] = False
    if kind == "between":
        mask[1, 20:27] = False
    return mask


def parts(query, key, value, mask, config):
    """Queries, keys, values and arguments of the mask function of a prompt, a chunk and two steps."""
    start = 0
    for end in ENDS:
        # Keys that a cache keeps for a window: those that the first of the new queries reads.
        offset = max(0, start - WINDOW + 1)
        arguments = {
            "batch_size": BATCH,
            "q_length": end - start,
            "kv_length": end - offset,
            "q_offset": start,
            "kv_offset": offset,
            "mask_function": sliding_window_causal_mask_function(WINDOW),
            "attention_mask": None if mask is None else mask[:, :end],
            "local_size": WINDOW,
            "config": config,
        }
        yield query[:, :, start:end], key[:, :, offset:end], value[:, :, offset:end], arguments
        start = end


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *(("eager", kind) for kind in PADDING),
        # The kernels take padding on the left only.
        *(pytest.param("triton", kind, marks=pytest.mark.kernels) for kind in ("none", "left")),
    ],
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_window_attention_equals_that_of_the_model(module, kind, has_sinks, backend, monkeypatch):
    choose = api.chosen_backend
    monkeypatch.setattr(api, "chosen_backend", lambda _, *call: choose(backend, *call))
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, heads, ENDS[-1], HEAD_DIM, generator=generator).to(device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    mask = mask_of(kind)
    mask = None if mask is None else mask.to(device)
    sinks = torch.randn(HEADS, generator=generator).to(device) if has_sinks else None
    attend = partial(sparse_attention, module, scaling=0.3, s_aux=sinks, sliding_window=WINDOW)
    for queries, keys, values, arguments in parts(query, key, value, mask, module.config):
        arguments["device"] = device
        positions = key_positions_as_mask(**arguments)
        assert isinstance(positions, WindowedPositions)
        found, _ = attend(queries, keys, values, positions)
        visible = key_positions_as_mask(**arguments, allow_is_causal_skip=False)
        additive = torch.zeros_like(visible, dtype=queries.dtype).masked_fill(~visible, -1e30)
        # A sink of no weight is no sink.
        own = torch.full((HEADS,), -1e30, device=device) if sinks is None else sinks
        module.sinks = torch.nn.Parameter(own)
        expected, _ = eager_attention_forward(module, queries, keys, values, additive, scaling=0.3)
        rows = slice(arguments["q_offset"], arguments["q_offset"] + queries.shape[2])
        real = visible.new_ones(BATCH, queries.shape[2]) if mask is None else mask[:, rows]
        # Kernels on a GPU multiply in TF32.
        atol = 2e-6 if device == "cpu" else 5e-3
        torch.testing.assert_close(found[real], expected[real], atol=atol, rtol=2e-5)
        assert not found[~real].any()


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_step_over_a_ring_equals_one_over_keys_in_order(module, backend, monkeypatch):
    choose = api.chosen_backend
    monkeypatch.setattr(api, "chosen_backend", lambda _, *call: choose(backend, *call))
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, heads, length, HEAD_DIM, generator=generator).to(device)
        for heads, length in ((HEADS, 1), (KV_HEADS, WINDOW), (KV_HEADS, WINDOW))
    )
    sinks = torch.randn(HEADS, generator=generator).to(device)
    # Positions of a full ring, of one that is not full yet, and of a sequence of padding alone.
    newest = torch.tensor([[20], [4], [-1]], device=device)
    positions = (newest - torch.arange(WINDOW, device=device).flip(0)).clamp(min=-1)
    attend = partial(sparse_attention, module, scaling=0.3, s_aux=sinks)
    ordered = WindowedPositions(positions, newest, WINDOW)
    expected, _ = attend(query, key, value, ordered)
    ring = ordered._replace(positions=positions.roll(3, 1))
    found, _ = attend(query, key.roll(3, 2), value.roll(3, 2), ring)
    torch.testing.assert_close(found, expected)
    assert not found[2].any()
    assert found[:2].any()
