"""Bits say which keys a mask shows."""

import torch

from rtpurbo.ops.flex.selection import BITS, packed_bits


def test_bits_are_the_mask():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 5, 77, generator=generator) < 0.5
    mask[0, 0, 0] = True  # every bit of a word, the sign among them
    words = packed_bits(mask, 128)
    assert words.shape == (2, 3, 5, 128 // BITS)
    assert words.dtype == torch.int32
    columns = torch.arange(128)
    found = ((words[..., columns >> 5] >> (columns & 31)) & 1) != 0
    assert torch.equal(found[..., :77], mask)
    assert not found[..., 77:].any()
