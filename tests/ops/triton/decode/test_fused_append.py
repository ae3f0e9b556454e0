"""A token that enters equals norm, rotation and projection in fp64, and lies in its slots alone."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.ops import HeadLayout
from rtpurbo.ops.triton.decode.fused_append import (
    AppendSlots,
    HeadNorm,
    IndexProjection,
    fused_kv_append,
)
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON

pytestmark = pytest.mark.kernels

CAPACITY, RING, NEWEST = 9, 6, 7


def normal(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


class Entrance:
    """Inputs of a fused KV append, and the cache that it writes to."""

    def __init__(
        self,
        dtype,
        heads=6,
        key_value_heads=3,
        head_dim=16,
        rotary_dim=16,
        index_dim=8,
        retrieval_heads=(1, 4),
        num_features=10,
        batch=2,
        one_rotation=False,
        norm="none",
        rotated=True,
        index_dtype=torch.float16,
        shared_keys=False,
    ):
        torch.manual_seed(0)
        self.dtype, self.batch, self.norm = dtype, batch, None
        fused = normal(batch, 1, (heads + 2 * key_value_heads) * head_dim, dtype=dtype)
        sizes = [heads * head_dim] + [key_value_heads * head_dim] * 2
        self.queries, self.keys, self.values = (
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in fused.split(sizes, -1)
        )
        angles = normal(1 if one_rotation else batch, 1, rotary_dim // 2, dtype=torch.float64)
        angles = torch.cat([angles, angles], -1)
        # In the precision of the model, or in fp32 as OLMo-2 has them.
        kind = torch.float32 if norm == "unit_offset" else dtype
        self.rotary = (angles.cos().to(kind), angles.sin().to(kind)) if rotary_dim else None
        if norm != "none":
            weights = [normal(head_dim, dtype=dtype) for _ in range(2)]
            self.norm = HeadNorm(*weights, 1e-2, norm == "unit_offset")
        self.layout = HeadLayout.build(retrieval_heads, heads, key_value_heads, DEVICE)
        num_full, ranks = len(self.layout.full_key_value_heads), len(retrieval_heads)
        self.projection, index_keys, self.shared_keys = None, None, shared_keys
        if ranks:
            dims = torch.randperm(head_dim)[:num_features].to(DEVICE)
            num_keys = num_full if shared_keys else ranks
            weights = [
                normal(count, index_dim, num_features, dtype=dtype) for count in (ranks, num_keys)
            ]
            self.projection = IndexProjection(*weights, dims, rotated)
            index_keys = normal(batch, num_keys, CAPACITY, index_dim, dtype=index_dtype)
        full = normal(2, batch, num_full, CAPACITY, head_dim, dtype=dtype)
        ring = normal(2, batch, key_value_heads - num_full, RING, head_dim, dtype=dtype)
        newest = torch.tensor([NEWEST], device=DEVICE)
        self.entering = [(3 * row + 2) % RING for row in range(batch)]
        entering = torch.tensor(self.entering, device=DEVICE)[:, None]
        self.slots = AppendSlots(newest, entering, *full, *ring, index_keys)

    def expected(self, states, weight):
        """Normed states, and those rotated, [B, heads, D]; fp64, rounded in between."""
        states = states[:, :, 0].double()
        if self.norm is not None:
            mean = states.square().mean(-1, keepdim=True)
            factor = weight.double() + self.norm.unit_offset
            states = (states * (mean + self.norm.epsilon).rsqrt() * factor).to(self.dtype).double()
        if self.rotary is None:
            return states, states
        cosines, sines = (part.double() for part in self.rotary)
        turned, kept = states.tensor_split([cosines.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        turned = turned * cosines + torch.cat([-second, first], -1) * sines
        return states, torch.cat([turned, kept], -1)

    def check(self):
        """Runs the kernel and compares all that it returns and writes."""
        slots = self.slots
        before = {name: copied(tensor) for name, tensor in vars(slots).items()}
        queries, index_queries = fused_kv_append(
            self.queries, self.keys, self.values, self.rotary,
            self.norm, self.projection, self.layout, slots,
        )  # fmt: skip
        norm, layout = self.norm, self.layout
        raw_queries, expected = self.expected(self.queries, norm and norm.query_weight)
        raw_keys, keys = self.expected(self.keys, norm and norm.key_weight)
        assert queries.dtype == self.dtype
        self.assert_close(queries[:, :, 0], expected)
        full, windowed = layout.full_key_value_heads, layout.windowed_key_value_heads
        values, places = self.values[:, :, 0], [NEWEST] * self.batch
        self.assert_written("full_keys", keys[:, full], places, before)
        self.assert_written("full_values", values[:, full], places, before, exactly=True)
        self.assert_written("windowed_keys", keys[:, windowed], self.entering, before)
        self.assert_written(
            "windowed_values", values[:, windowed], self.entering, before, exactly=True
        )
        if self.projection is None:
            assert index_queries is None
            return
        rotated, dims = self.projection.rotated, self.projection.feature_dimensions
        heads = layout.retrieval.heads
        kv_head_index = full if self.shared_keys else full[layout.retrieval.key_value_heads]
        features = (expected if rotated else raw_queries)[:, heads][..., dims]
        index = torch.einsum("brn,rin->bri", features, self.projection.query_weight.double())
        is_wide = self.dtype == torch.bfloat16
        assert index_queries.dtype == (torch.float16 if is_wide else self.dtype)
        self.assert_close(index_queries[:, :, 0], index)
        features = (keys if rotated else raw_keys)[:, kv_head_index][..., dims]
        index = torch.einsum("brn,rin->bri", features, self.projection.key_weight.double())
        self.assert_written("index_keys", index, places, before)

    def assert_close(self, actual, expected, exactly=False):
        if exactly:
            assert torch.equal(actual, expected)
        elif expected.numel():
            epsilon = EPSILON.get(actual.dtype, 2**-4)  # of float8_e4m3fn
            tolerance = 4 * max(epsilon, EPSILON[self.dtype]) * expected.abs().max().item()
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)

    def assert_written(self, name, expected, places, before, exactly=False):
        """The states [B, heads, dim] lie in these slots, and everything else is as before."""
        actual, old = getattr(self.slots, name), before[name]
        for row, slot in enumerate(places):
            self.assert_close(actual[row, :, slot], expected[row], exactly)
            old[row, :, slot] = actual[row, :, slot]
        assert torch.equal(bits(actual), bits(old))


def copied(tensor):
    return None if tensor is None else tensor.clone()


def bits(tensor):
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "weight", "unit_offset"])
@pytest.mark.parametrize("rotary_dim", [0, 6, 16])
@pytest.mark.parametrize("rotated", [True, False])
def test_norms_and_rotations(dtype, norm, rotary_dim, rotated):
    Entrance(dtype, norm=norm, rotary_dim=rotary_dim, rotated=rotated).check()


@pytest.mark.parametrize("retrieval_heads", [(), (0,), (1, 2, 5), range(6)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared_keys", [False, True])
def test_sets_of_heads(retrieval_heads, batch, shared_keys):
    options = {"batch": batch, "norm": "weight", "shared_keys": shared_keys}
    Entrance(torch.float16, retrieval_heads=retrieval_heads, **options).check()


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "retrieval_heads"),
    [(3, 3, (0, 2)), (4, 2, (2, 3)), (6, 2, (0, 2, 4)), (12, 2, range(12)), (12, 2, (7, 8, 11))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_keys_shared_by_the_heads_of_a_kv_head(
    dtype, heads, key_value_heads, retrieval_heads
):
    Entrance(
        dtype, heads, key_value_heads, retrieval_heads=retrieval_heads, shared_keys=True
    ).check()


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "head_dim", "index_dim", "num_features"),
    [(1, 1, 72, 1, 1), (8, 2, 96, 12, 60), (4, 4, 128, 64, 128), (3, 1, 256, 16, 130)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, heads, key_value_heads, head_dim, index_dim, num_features):
    Entrance(
        dtype,
        heads,
        key_value_heads,
        head_dim,
        head_dim // 2,
        index_dim,
        (0,),
        num_features,
        norm="weight",
        one_rotation=True,
    ).check()


def test_index_keys_in_eight_bits():
    Entrance(DTYPES[0], index_dtype=torch.float8_e4m3fn, norm="weight").check()


def test_storages_may_have_any_strides():
    entrance = Entrance(torch.float16, norm="weight")
    slots = entrance.slots
    names = ("full_keys", "full_values", "windowed_keys", "windowed_values", "index_keys")
    strided = {
        name: getattr(slots, name).transpose(1, 2).contiguous().transpose(1, 2) for name in names
    }
    entrance.slots = replace(slots, **strided)
    entrance.check()
