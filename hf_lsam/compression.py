"""Fewer bits over slow links: block-wise rounding, with error feedback so that nothing is lost.

Each block of 64 values shares a power of two as its scale, as in the OCP Microscaling formats; the values are integer
multiples of it, in 8 or 4 bits:

    s = 2^ceil(log2(max|v| / L))      v -> s round(v / s)      L = 127 or 7

The rounding error is not lost: the sender keeps it and adds it to what it sends next (error feedback, Seide et al.
2014; Karimireddy et al., arXiv 1901.09847). What has been decoded plus what is held back equals what was to be sent.

A vector that has already been rounded encodes without further error: the largest code of a block is above L / 2, so its
scale comes out the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64
BITS = (32, 8, 4)  # 32: float32, as it is
_CHUNK = 1 << 17  # values processed at a time, so that intermediate results stay in the cache


def encoded_bytes(numel: int, bits: int) -> int:
    """The size of an encoded vector of `numel` values: one byte per block for its scale, plus the codes."""
    if bits == 32:
        return 4 * numel
    blocks = -(-numel // BLOCK)
    return blocks + blocks * BLOCK * bits // 8


@torch.no_grad()
def encode(vector: Tensor, bits: int) -> Tensor:
    """Encodes each value of `vector` as the nearest code.

    Args:
        vector: float32 [d], with a finite squared norm.
        bits: 8 or 4.

    Returns:
        uint8 [encoded_bytes(d, bits)]: the exponents of all blocks, plus 127, followed by the codes. 4-bit codes are
        packed two per byte, the first in the lower half.
    """
    encoded = torch.empty(encoded_bytes(vector.numel(), bits), dtype=torch.uint8)
    exponents, codes = _exponents_and_codes(encoded, vector.numel(), bits)
    first = 0
    for values in _blocks(vector):
        last = first + len(values)
        whole, biased = _codes(values, bits)
        exponents[first:last] = biased
        if bits == 8:
            codes[first:last] = whole
        else:
            small = whole.to(torch.int8)
            codes[first:last] = (small[:, 0::2] & 15) | (small[:, 1::2] << 4)
        first = last
    return encoded


@torch.no_grad()
def decode(encoded: Tensor, bits: int, out: Tensor) -> Tensor:
    """Decodes exactly the values that `encode` chose.

    Args:
        encoded: uint8, from `encode`.
        bits: 8 or 4.
        out: float32 [d]; overwritten.

    Raises:
        ValueError: if `encoded` does not have the length of a vector of d values with this many bits.
    """
    if encoded.numel() != encoded_bytes(out.numel(), bits):
        raise ValueError(
            f"{encoded.numel()} bytes cannot be {out.numel()} values of {bits} bits, which take "
            f"{encoded_bytes(out.numel(), bits)}: sender and receiver differ in the model or in the bits."
        )
    exponents, codes = _exponents_and_codes(encoded, out.numel(), bits)
    left = out
    for biased, whole in zip(exponents.split(_CHUNK // BLOCK), codes.split(_CHUNK // BLOCK), strict=True):
        if bits == 4:
            whole = torch.stack([whole << 4 >> 4, whole >> 4], 2).flatten(1)  # sign-extends both halves
        values = (whole * _power_of_two(biased.to(torch.int32))).flatten()[: left.numel()]
        left[: values.numel()] = values
        left = left[values.numel() :]
    return out


@torch.no_grad()
def round_(vector: Tensor, bits: int, rest: Tensor | None = None) -> Tensor:
    """Rounds `vector` to the values that it would have after `encode` and `decode`.

    Args:
        vector: float32 [d], with a finite squared norm; rounded in place.
        bits: 32, 8 or 4; 32 leaves it as it is.
        rest: float32 [d]; overwritten with the rounding error, `vector` before minus `vector` after.

    Returns:
        `vector`.
    """
    if bits == 32:
        if rest is not None:
            rest.zero_()
        return vector
    first = 0
    for values in _blocks(vector):
        last = min(first + values.numel(), vector.numel())
        whole, biased = _codes(values, bits)
        result = whole.mul_(_power_of_two(biased)).flatten()[: last - first]
        if rest is not None:
            torch.sub(vector[first:last], result, out=rest[first:last])
        vector[first:last] = result
        first = last
    return vector


def _blocks(vector: Tensor) -> Iterator[Tensor]:
    """`vector` [d] in pieces of shape [blocks, BLOCK], the last block padded with zeros."""
    whole = vector.numel() // BLOCK * BLOCK
    for piece in vector[:whole].split(_CHUNK):
        yield piece.view(-1, BLOCK)
    if whole < vector.numel():
        yield torch.nn.functional.pad(vector[whole:], (0, whole + BLOCK - vector.numel())).view(1, BLOCK)


def _codes(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of `values` [blocks, BLOCK], integers as float32, and the exponents plus 127, int32 [blocks, 1]."""
    scale = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    # The exponent of a float32 sits above its 23 fraction bits. Adding 2^23 - 1 carries any nonzero fraction into it,
    # which rounds log2 up.
    biased = ((scale.view(torch.int32) + 0x7FFFFF) >> 23).clamp_(min=1)
    return (values * _power_of_two(254 - biased)).round_(), biased


def _power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127) as float32, for int32 from 1 to 254."""
    return (biased << 23).view(torch.float32)


def _exponents_and_codes(encoded: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor]:
    """Views of `encoded`: exponents, uint8 [blocks, 1], and codes, int8 [blocks, bytes per block]."""
    blocks = -(-numel // BLOCK)
    return encoded[:blocks].view(blocks, 1), encoded[blocks:].view(torch.int8).view(blocks, BLOCK * bits // 8)
