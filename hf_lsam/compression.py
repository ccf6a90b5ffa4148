"""What crosses a slow link in few bits: block-wise rounding, and the feedback that loses nothing of it.

A block of 64 values shares a power of two as its scale, as in the OCP Microscaling formats; the values are whole
multiples of it, of 8 or 4 bits:

    s = 2^ceil(log2(max|v| / L))      v -> s round(v / s)      L = 127 or 7

What rounding leaves behind is not lost: the sender keeps it and adds it to what it sends next (error feedback, Seide et
al. 2014; Karimireddy et al., arXiv 1901.09847). What was decoded plus what is held back is what was to be sent.

A vector that has been rounded encodes without a further error: the largest code of a block is above L / 2, so its scale
comes out the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
BITS = (32, 8, 4)  # 32: float32, as it is


def encoded_bytes(numel: int, bits: int) -> int:
    """What a vector of `numel` values takes: a byte a block for its scale, and the values."""
    if bits == 32:
        return 4 * numel
    blocks = -(-numel // BLOCK)
    return blocks + blocks * BLOCK * bits // 8


@torch.no_grad()
def encode(vector: Tensor, bits: int) -> Tensor:
    """The nearest codes of `vector`.

    Args:
        vector: float32 [d], whose squared norm is finite.
        bits: 8 or 4.

    Returns:
        uint8 [encoded_bytes(d, bits)]: the exponents of all blocks, plus 127, and then the codes; two a byte, the first
        in the lower half, where they have 4 bits.
    """
    codes, exponents = _round(vector, bits)
    codes = codes.to(torch.int8).view(torch.uint8).flatten()
    if bits == 4:
        codes = (codes[0::2] & 15) | (codes[1::2] << 4)
    return torch.cat([(exponents.flatten() + 127).to(torch.uint8), codes])


@torch.no_grad()
def decode(encoded: Tensor, bits: int, out: Tensor) -> Tensor:
    """The values that `encode` chose, exactly.

    Args:
        encoded: uint8, from `encode`.
        bits: 8 or 4.
        out: float32 [d]; written over.

    Raises:
        ValueError: if `encoded` is not as long as a vector of this length and these bits is.
    """
    if encoded.numel() != encoded_bytes(out.numel(), bits):
        raise ValueError(
            f"{encoded.numel()} bytes cannot be {out.numel()} values of {bits} bits, which take "
            f"{encoded_bytes(out.numel(), bits)}: sender and receiver differ in the model or in the bits."
        )
    blocks = -(-out.numel() // BLOCK)
    exponents, codes = encoded[:blocks].to(torch.int32) - 127, encoded[blocks:]
    if bits == 4:
        codes = torch.stack([codes << 4, codes & 0xF0], 1).flatten()  # the upper half carries the sign
        exponents = exponents - 4
    values = torch.ldexp(codes.view(torch.int8).view(blocks, BLOCK).to(torch.float32), exponents.unsqueeze(1))
    return out.copy_(values.flatten()[: out.numel()])


@torch.no_grad()
def rounded(vector: Tensor, bits: int) -> Tensor:
    """What `decode` gives of what `encode` gives of `vector`, float32 [d]; `vector` itself with 32 bits."""
    if bits == 32:
        return vector
    codes, exponents = _round(vector, bits)
    return torch.ldexp(codes, exponents).flatten()[: vector.numel()]


def _round(vector: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, whole float32 [blocks, BLOCK], and exponents, int32 [blocks, 1]."""
    blocks = -(-vector.numel() // BLOCK)
    values = torch.nn.functional.pad(vector, (0, blocks * BLOCK - vector.numel())).view(blocks, BLOCK)
    largest = 2 ** (bits - 1) - 1
    mantissa, exponents = torch.frexp(values.abs().amax(1, keepdim=True) / largest)  # mantissa in [1/2, 1), or 0
    exponents = (exponents - (mantissa == 0.5).int()).clamp(-126, 127)
    return torch.ldexp(values, -exponents).round(), exponents
