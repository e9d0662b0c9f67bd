import pytest
import torch

from algorithms.numerics.bit_packing import pack_bits, packed_words, unpack_bits


def by_definition(row: list[int], bits: int) -> list[int]:
    """One row's words from one whole number that holds the whole stream."""
    stream = sum(code << (place * bits) for place, code in enumerate(row))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 10, 11, 31, 32, 33, 96, 100])
def test_words_are_the_definition_and_come_back(bits, count):
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    codes = torch.randint(1 << bits, (2, 3, count), generator=generator, dtype=torch.uint8)
    codes[0, 0] = (1 << bits) - 1
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, packed_words(count, bits))
    for row, packed in zip(codes.flatten(0, 1).tolist(), words.flatten(0, 1).tolist(), strict=True):
        assert packed == by_definition(row, bits)
    assert torch.equal(unpack_bits(words, bits, count), codes)


def test_a_hand_made_word():
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 6], dtype=torch.uint8), 3).tolist() == [
        0b10_000_000_000_111_110_101_100_011_010_001 - (1 << 32),
        0b1,
    ]


def test_columns_are_packed_through_a_transposed_view():
    codes = torch.arange(64, dtype=torch.uint8).view(32, 2) % 8
    assert torch.equal(pack_bits(codes.T, 3), pack_bits(codes.T.contiguous(), 3))
    one = codes[:, :1]
    assert torch.equal(pack_bits(one.T, 3), pack_bits(one.T.clone(memory_format=torch.contiguous_format), 3))
    assert torch.equal(unpack_bits(pack_bits(one.T, 3).T.contiguous().T, 3, 32), one.T)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, not {bits}"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_packs_the_same_words():
    codes = torch.randint(8, (5, 77), dtype=torch.uint8)
    words = pack_bits(codes.cuda(), 3)
    assert torch.equal(words.cpu(), pack_bits(codes, 3))
    assert torch.equal(unpack_bits(words, 3, 77).cpu(), codes)
