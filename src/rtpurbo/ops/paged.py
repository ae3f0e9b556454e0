"""Keys and values in pages of a few tokens, as servers keep them; sequences differ in length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedStates:
    """The full KV heads of a batch, in pages that any sequence may hold.

    The token at position p of sequence b lies in row p % page_size of page
    `block_table[b, p // page_size]`. There is no padding: sequence b has `lengths[b]` tokens, and the
    query of a decoding step is the last of them.

    Attributes:
        key_pages: [num_pages, num_key_value_heads, page_size, head_dim], after RoPE.
        value_pages: the same shape.
        block_table: int32 [batch, max_pages], rows contiguous; entries behind a sequence's end are not read.
        lengths: int32 [batch]; 0 for an empty place in the batch.
        index_pages: [num_pages, num_index_keys, page_size, index_dim], as `KeyValueStates.index_keys`;
            None where nothing retrieves.
    """

    key_pages: Tensor
    value_pages: Tensor
    block_table: Tensor
    lengths: Tensor
    index_pages: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.key_pages.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that the block table has room for in each sequence."""
        return self.block_table.shape[1] * self.page_size
