"""Block-wise rounding against its definition, and what error feedback promises."""

import pytest
import torch

from hf_lsam.compression import _CHUNK, BLOCK, decode, encode, encoded_bytes, round_


def rounded(vector, bits):
    return round_(vector.clone(), bits)


def vectors():
    generator = torch.Generator().manual_seed(0)
    for numel in (1, 63, 64, 65, 1000):
        yield torch.randn(numel, generator=generator)
        yield torch.randn(numel, generator=generator) * torch.logspace(-18, 18, numel)
    yield torch.zeros(100)
    yield torch.tensor([127.0] + [0.5] * 70)  # a scale that is a power of two itself
    yield torch.tensor([7.0, -7.0, 3.5, 1.0])
    yield torch.full((3,), 1e-40)  # below the smallest scale
    yield torch.full((3,), 1e18)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_value_is_the_nearest_multiple_of_its_blocks_power_of_two(bits):
    largest = 2 ** (bits - 1) - 1
    for vector in vectors():
        result = rounded(vector, bits)
        for block, found in zip(vector.split(BLOCK), result.split(BLOCK), strict=True):
            scale = 2.0**-126
            while block.abs().max() > largest * scale:
                scale *= 2
            assert (found - block).abs().max() <= scale  # half a step, or one where the maximum is a power of two
            multiples = found.double() / scale
            assert torch.equal(multiples * 2, (multiples * 2).round())
            assert multiples.abs().max() <= largest


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_decoded_is_what_was_rounded_and_rounds_to_itself(bits):
    for vector in vectors():
        encoded = encode(vector, bits)
        assert encoded.dtype == torch.uint8
        assert encoded.numel() == encoded_bytes(vector.numel(), bits)
        result = decode(encoded, bits, torch.empty_like(vector))
        assert torch.equal(result, rounded(vector, bits))
        assert torch.equal(rounded(result, bits), result)


@pytest.mark.parametrize("bits", [8, 4])
def test_with_feedback_the_sum_of_what_arrives_is_the_sum_of_what_was_sent(bits):
    generator = torch.Generator().manual_seed(1)
    sent, arrived, held_back = torch.zeros(3, 500, dtype=torch.float64)
    for _ in range(50):
        vector = torch.randn(500, generator=generator)
        sent += vector
        want = (vector + held_back).float()
        result = rounded(want, bits)
        held_back = (want - result).double()
        arrived += result
    assert torch.allclose(arrived + held_back, sent, atol=1e-4)
    assert held_back.abs().max() < 4.0 / 2 ** (bits - 2)  # bounded, however long the run


@pytest.mark.parametrize("bits", [8, 4])
def test_a_long_vector_comes_out_as_by_the_formula(bits):
    vector = torch.randn(2 * _CHUNK + 100, generator=torch.Generator().manual_seed(2)).cumsum(0)
    padded = torch.nn.functional.pad(vector.double(), (0, -vector.numel() % BLOCK)).view(-1, BLOCK)
    scale = torch.exp2(torch.ceil(torch.log2(padded.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))))
    want = (scale * (padded / scale).round()).flatten()[: vector.numel()].float()
    rest = torch.empty_like(vector)
    result = vector.clone()
    assert round_(result, bits, rest) is result
    assert torch.equal(result, want)
    assert torch.equal(rest, vector - want)
    assert torch.equal(decode(encode(vector, bits), bits, rest), want)


def test_32_bits_leave_nothing_behind():
    vector, rest = torch.tensor([1.0, 1e-30]), torch.ones(2)
    assert torch.equal(round_(vector, 32, rest), torch.tensor([1.0, 1e-30]))
    assert torch.equal(rest, torch.zeros(2))


def test_bytes():
    assert encoded_bytes(6400, 32) == 25_600
    assert encoded_bytes(6400, 8) == 6_500
    assert encoded_bytes(6400, 4) == 3_300


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="65 bytes cannot be 65 values of 8 bits"):
        decode(encode(torch.ones(64), 8), 8, torch.empty(65))
