"""Dense attention within documents that are packed in one sequence."""

import pytest
import torch

from rtpurbo.ops.eager.attend import attend
from rtpurbo.ops.packed import document_starts, packed_attention

SCALING = 0.3


def states(length, heads=4, key_value_heads=2, dtype=torch.float32, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, length, head_dim) for count in (heads, key_value_heads, key_value_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def block_diagonal(queries, keys, values, lengths):
    """The same with an explicit mask."""
    group = queries.shape[1] // keys.shape[1]
    places = torch.arange(queries.shape[2], device=queries.device)
    starts = document_starts(lengths, queries.device)
    visible = (places >= starts[:, None]) & (places <= places[:, None])
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    return attend(queries, keys, values, visible, SCALING, True)[0]


@pytest.mark.parametrize("lengths", [(33,), (10, 1, 22)], ids=str)
def test_documents_do_not_see_each_other(lengths):
    given = states(33)
    output = packed_attention(*given, lengths, scaling=SCALING)
    torch.testing.assert_close(output, block_diagonal(*given, lengths), atol=1e-5, rtol=1e-5)


def test_the_place_where_each_document_begins():
    assert document_starts([2, 1, 3], "cpu").tolist() == [0, 0, 2, 3, 3, 3]


@pytest.mark.parametrize("lengths", [(32,), (33, 0), ()], ids=str)
def test_documents_must_make_up_the_sequence(lengths):
    with pytest.raises(ValueError, match="must be positive and sum to 33"):
        packed_attention(*states(33), lengths, scaling=SCALING)
