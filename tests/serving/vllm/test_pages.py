from dataclasses import replace

import torch

from rtpurbo.serving.vllm.pages import Part, divide

PARTS = {
    0: (Part(2, 8, torch.bfloat16), Part(2, 8, torch.bfloat16), Part(3, 4, torch.float16)),
    5: (Part(1, 8, torch.bfloat16), Part(1, 8, torch.bfloat16), Part(0, 4, torch.float16)),
    6: (Part(0, 8, torch.bfloat16), Part(0, 8, torch.bfloat16), Part(2, 4, torch.float8_e4m3fn)),
}
SIZE, BLOCKS = 16, 4


def cache():
    """Blocks whose last bytes are another group's."""
    token = sum(part.token_bytes for parts in PARTS.values() for part in parts)
    memory = torch.zeros(BLOCKS, 1, SIZE * token + 32, dtype=torch.int8)
    blocks = memory[:, :, : SIZE * token].unflatten(2, (SIZE, token))
    return memory, blocks.view(torch.bfloat16)


def test_parts_share_a_block_without_touching_each_other():
    memory, blocks = cache()
    pages = divide(blocks, PARTS)
    number = 0
    for layer, parts in PARTS.items():
        views = (pages[layer].keys, pages[layer].values, pages[layer].index_keys)
        for part, view in zip(parts, views, strict=True):
            assert view.shape == (BLOCKS, part.heads, SIZE, part.size)
            assert view.dtype == part.dtype
            number += 1
            view.fill_(number)
    number = 0
    for layer in PARTS:
        for view in (pages[layer].keys, pages[layer].values, pages[layer].index_keys):
            number += 1
            assert (view.float() == number).all()
    assert (memory[..., -32:] == 0).all()


def test_tokens_go_to_their_slots_and_padding_leaves_zeros():
    _, blocks = cache()
    pages = divide(blocks, PARTS)[0]
    keys, values, index_keys = (
        torch.randn(3, heads, size) for heads, size in [(2, 8), (2, 8), (3, 4)]
    )
    keys[1] = torch.nan
    pages.write(torch.tensor([2 * SIZE + 3, -1, 3 * SIZE + 15]), keys, values, index_keys)
    for written, given in (
        (pages.keys, keys),
        (pages.values, values),
        (pages.index_keys, index_keys),
    ):
        assert torch.equal(written[2, :, 3], given[0].to(written.dtype))
        assert torch.equal(written[3, :, 15], given[2].to(written.dtype))
        assert (written[0] == 0).all()
        assert written.count_nonzero() == 2 * given[0].numel()


def test_float8_states_are_divided_by_their_scale_and_clamped():
    part = Part(2, 8, torch.float8_e4m3fn)
    blocks = torch.zeros(BLOCKS, 1, SIZE, 2 * part.token_bytes, dtype=torch.uint8)
    (pages,) = divide(blocks, {0: (part, part)}).values()
    pages = replace(pages, key_scale=0.5, value_scale=0.01)
    keys, values = torch.randn(1, 2, 8), torch.full((1, 2, 8), -9.0)
    pages.write(torch.tensor([2 * SIZE + 3]), keys, values)
    stored = pages.keys[2, :, 3].float() * 0.5
    torch.testing.assert_close(stored, keys[0], rtol=2**-4, atol=2**-10)
    assert (pages.values[2, :, 3].float() == -448).all()
