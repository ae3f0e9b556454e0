"""Rotary embedding of a layer, measured by running the layer's attention module.

Models differ in the dimensions they rotate, in their pairs, and in the layout of cosines and sines. A
layer is therefore run with chosen cosines and sines, and its queries and keys show which column
rotates which dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError

# Bits of the number that identifies a column: enough for head dimensions below 2,048.
CODE_BITS = 10
# What a rotation by a right angle changes, relative to the size of a head; a norm behind it changes less.
THRESHOLD = 2e-2

Embeddings = Any
"""Cosines and sines that a model passes to its layers: a pair of tensors, or one complex tensor."""


@dataclass(frozen=True)
class RotaryLayout:
    """Rotation of a layer's heads.

    Attributes:
        frequencies: float64 [head_dim], radians a token; 0 for dimensions that are not rotated.
        columns: int64 [head_dim], the column of cosines and sines that rotates each dimension.
        partners: int64 [head_dim], the other dimension of its pair; itself if it is not rotated. None
            if the pairs are not known.
        signs: float32 [head_dim], the sign of the sine in `x cos + sign x[partner] sin`; 0 if not rotated.
    """

    frequencies: Tensor
    columns: Tensor
    partners: Tensor | None
    signs: Tensor

    @property
    def is_rotated(self) -> bool:
        """True if any dimension is rotated."""
        return bool((self.signs != 0).any())

    def undo(self, states: Tensor, embeddings: Embeddings) -> Tensor:
        """Returns states [batch, heads, length, head_dim] of the last tokens of a forward before the rotation."""
        assert self.partners is not None
        if not self.is_rotated:
            return states
        device = states.device
        parts = _parts(embeddings)
        assert parts is not None
        columns, partners = self.columns.to(device), self.partners.to(device)
        signs = self.signs.to(device)
        cosines, sines = (
            part[:, -states.shape[2] :][..., columns].unsqueeze(1).to(torch.float32)
            for part in parts
        )
        rotated = signs != 0
        # Cosines and sines may hold a factor of their own (YaRN), which is undone too.
        norm = cosines.square() + sines.square()
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        undone = (exact * cosines - exact[..., partners] * signs * sines) / norm
        return torch.where(rotated, undone, exact).to(states.dtype)


def invertible(layer: int, rotation: RotaryLayout | None) -> RotaryLayout:
    """Returns the rotation of a layer, if it can be undone.

    Raises:
        RTPurboError: it cannot, or is not known.
    """
    if rotation is None or rotation.partners is None:
        raise RTPurboError(
            f"the rotary embedding of layer {layer} cannot be undone, which index_space 'pre_rope' "
            "needs: choose 'low_frequency'."
        )
    return rotation


def unrotated(head_dim: int) -> RotaryLayout:
    """Returns the layout of a layer without a rotation."""
    return RotaryLayout(
        torch.zeros(head_dim, dtype=torch.float64),
        torch.zeros(head_dim, dtype=torch.int64),
        torch.arange(head_dim),
        torch.zeros(head_dim),
    )


@dataclass(frozen=True)
class RotaryProbe:
    """Cosines and sines whose effect on a layer's queries and keys shows how it rotates them.

    Attributes:
        plain: embeddings that rotate nothing.
        coded: embeddings in which a column rotates by a right angle at those tokens whose bit is set in
            the column's code, and not at the others.
        codes: int64 [columns]; 0 for columns that never rotate. Equal columns have equal codes.
        angles: float64 [columns], radians a token.
    """

    plain: Embeddings
    coded: Embeddings
    codes: Tensor
    angles: Tensor

    @classmethod
    def of(cls, embeddings: Embeddings) -> RotaryProbe | None:
        """Returns a probe with the shape of a layer's embeddings, of tokens of which the second has position 1.

        Returns:
            None if the embeddings are of no known form.
        """
        parts = _parts(embeddings)
        if parts is None:
            return None
        cosines, sines = (part[0].double().cpu() for part in parts)
        # Equal columns are one rotation: a pair of dimensions often has a column for each.
        _, inverse = torch.cat([cosines, sines]).unique(dim=1, return_inverse=True)
        angles = torch.atan2(sines[1], cosines[1]).abs()
        codes = torch.where(angles == 0, 0, inverse + 1)
        length = cosines.shape[0]
        if int(codes.max()) >= 1 << CODE_BITS or length < CODE_BITS:
            return None
        bits = torch.arange(length)[:, None] % CODE_BITS
        turned = ((codes >> bits) & 1).double()
        plain = _like(embeddings, torch.ones_like(cosines), torch.zeros_like(sines))
        return cls(plain, _like(embeddings, 1 - turned, turned), codes, angles)

    def layout(self, plain: Tensor, coded: Tensor) -> RotaryLayout | None:
        """Returns the rotation that explains a layer's states under both embeddings; None if there is none.

        States are queries and keys [batch, heads, tokens, head_dim] of the same hidden states.
        """
        plain, coded = plain[0].double().cpu(), coded[0].double().cpu()
        size = plain.square().mean(-1, keepdim=True).sqrt()
        changed = ((coded - plain).abs() > THRESHOLD * size).any(0)
        length, head_dim = changed.shape
        found = torch.zeros(head_dim, dtype=torch.int64)
        for bit in range(CODE_BITS):
            found |= changed[bit::CODE_BITS].any(0).long() << bit
        result = unrotated(head_dim)
        paired = True
        for code in found[found > 0].unique().tolist():
            matching = (self.codes == code).nonzero()
            if not matching.numel():
                return None
            column, dims = int(matching[0]), (found == code).nonzero()[:, 0].tolist()
            result.columns[dims] = column
            result.frequencies[dims] = self.angles[column]
            if len(dims) != 2:
                result.signs[dims] = 1.0
                paired = False
                continue
            tokens = [token for token in range(length) if (code >> (token % CODE_BITS)) & 1]
            for dim, other in (dims, reversed(dims)):
                assert result.partners is not None
                result.partners[dim] = other
                product = (coded[:, tokens, dim] * plain[:, tokens, other]).sum()
                result.signs[dim] = float(product.sign())
        if paired:
            return result
        return RotaryLayout(result.frequencies, result.columns, None, result.signs)


def _parts(embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
    """Returns cosines and sines, [batch, length, columns] each; None if the form is not known."""
    if isinstance(embeddings, Tensor) and embeddings.is_complex():
        parts = [embeddings.real, embeddings.imag]
    elif isinstance(embeddings, (tuple, list)) and len(embeddings) == 2:
        parts = list(embeddings)
    else:
        return None
    if any(not isinstance(part, Tensor) or part.ndim not in (2, 3) for part in parts):
        return None
    cosines, sines = (part if part.ndim == 3 else part[None] for part in parts)
    return cosines, sines


def _like(embeddings: Embeddings, cosines: Tensor, sines: Tensor) -> Embeddings:
    """Returns cosines and sines [length, columns] in the form of a model's embeddings."""
    if isinstance(embeddings, Tensor):
        value = torch.complex(cosines, sines).to(embeddings.dtype)
        return value.to(embeddings.device).expand(embeddings.shape)
    return tuple(
        value.to(part.dtype).to(part.device).expand(part.shape)
        for value, part in zip((cosines, sines), embeddings, strict=True)
    )
