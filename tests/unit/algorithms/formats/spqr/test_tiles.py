from dataclasses import replace

import pytest
import torch

from algorithms.formats.spqr.tiles import pack, quantization_config, refusal, unpack
from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics
from tests.support.matrices import sparse_weight


def same_dense_part(one: SparseQuantized, other: SparseQuantized) -> bool:
    pairs = [(one.codes, other.codes)]
    for a, b in ((one.scales, other.scales), (one.zeros, other.zeros)):
        pairs += [(a.codes, b.codes), (a.run_scales, b.run_scales), (a.run_zeros, b.run_zeros)]
    pairs += [(one.outliers.offsets, other.outliers.offsets), (one.outliers.columns, other.outliers.columns)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shape", [(16, 16), (48, 64), (20, 32), (33, 48), (7, 16)])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_packed_comes_back(shape, ordered):
    weight = sparse_weight(*shape, ordered=ordered, outliers=0.1)
    tensors = pack(weight, "a")
    assert tensors["a.dense_weights"].numel() == -(-shape[0] // 16) * shape[1]
    assert (tensors["a.dense_weights"] >= 0).all()  # bits 62 and 63 are free
    back = unpack(tensors, "a", shape)
    assert same_dense_part(weight, back)
    assert (back.order is None) == ordered
    # The distance of an outlier from the dense part is rounded to 11 bits.
    difference = (back.dequantize() - weight.dequantize()).abs().max()
    assert difference <= weight.dequantize().abs().max() * 2**-10
    without = replace(weight, outliers=Outliers.of(torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)))
    assert torch.equal(unpack(pack(without, "a"), "a", shape).dequantize(), without.dequantize())


def test_the_words_of_a_tile_bit_by_bit():
    first = torch.tensor([[0x3C01, 0xBC02, 0x4003, 0xC0FF]], dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    codes = (torch.arange(256).view(16, 16) * 5 % 8).to(torch.uint8)
    scale_codes, zero_codes = (torch.arange(16).view(16, 1) * step % 8 for step in (3, 7))
    weight = SparseQuantized(
        codes=codes,
        scales=Statistics(codes=scale_codes.to(torch.uint8), run_scales=first[:, 0:1], run_zeros=first[:, 2:3], bits=3, run=16),
        zeros=Statistics(codes=zero_codes.to(torch.uint8), run_scales=first[:, 1:2], run_zeros=first[:, 3:4], bits=3, run=16),
        outliers=Outliers.of(torch.zeros(16, 16, dtype=torch.bool), torch.zeros(16, 16)),
        order=None,
        bits=3,
    )
    tensors = pack(weight, "a")
    octets = [0x01, 0x3C, 0x02, 0xBC, 0x03, 0x40, 0xFF, 0xC0]
    for row, word in enumerate(tensors["a.dense_weights"].tolist()):
        fields = [int(scale_codes[row]), int(zero_codes[row]), *codes[row].tolist()]
        assert word == sum(field << 3 * place for place, field in enumerate(fields)) | octets[row // 2] << 54
    assert tensors["a.in_perm"].tolist() == [(2 * pair + 1) << 16 | 2 * pair for pair in range(8)]


def test_far_columns_and_negative_outliers_keep_their_bits():
    columns = 65536
    weight = sparse_weight(2, columns, outliers=0.0, ordered=False)
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[0, [5, 32768, 65535]] = mask[1, 40000] = True
    values = torch.full((2, columns), -3.5)
    values[0, 32768] = 2.25
    weight = replace(weight, outliers=Outliers.of(mask, values))
    tensors = pack(weight, "a")
    assert [number & 0xFFFF for number in tensors["a.col_vals"].tolist()] == [5, 32768, 65535, 40000]
    assert (tensors["a.in_perm"] < 0).any()
    back = unpack(tensors, "a", (2, columns))
    assert torch.equal(back.order, weight.order)
    assert torch.allclose(back.outliers.values, torch.tensor([-3.5, 2.25, -3.5, -3.5]), atol=2**-9)


def test_the_kernel_s_sum_is_the_weight():
    """Dense part plus stored distance, each worked out here from the words, as the kernel does."""
    weight = sparse_weight(16, 16, outliers=0.2)
    tensors = pack(weight, "a")
    words = tensors["a.dense_weights"].tolist()
    octets = bytes(word >> 54 & 0xFF for word in words[::2])
    half = torch.frombuffer(bytearray(octets), dtype=torch.float16).float().tolist()
    total = torch.zeros(16, 16)
    for row, word in enumerate(words):
        scale = half[0] * ((word & 7) - half[2])
        zero = half[1] * ((word >> 3 & 7) - half[3])
        total[row] = torch.tensor([scale * ((word >> 6 + 3 * place & 7) - zero) for place in range(16)])
    offsets = tensors["a.row_offsets"].tolist()
    for row in range(16):
        for number in tensors["a.col_vals"][offsets[row] : offsets[row + 1]].tolist():
            value = torch.tensor([number >> 16], dtype=torch.int16).view(torch.float16).item()
            total[row, number & 0xFFFF] += value
    assert torch.allclose(total, weight.dequantize(), atol=2**-11)  # half a step of distances up to 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 4}, r"wbits: 3 \(it is 4\)"),
        ({"group_size": 32}, r"groupsize: 16 \(it is 32\)"),
        ({"statistic_bits": 16}, r"qq_scale_bits: 3 \(it is 16\), qq_zero_bits: 3"),
        ({"run": 8}, r"qq_groupsize: 16 \(it is 8\)"),
    ],
)
def test_other_settings_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        pack(sparse_weight(16, 64, **changes), "a")


def test_settings_are_explained_and_shapes_are_written():
    fine = {"bits": 3, "symmetric": False, "group_size": 16, "has_column_groups": True}
    assert refusal(**fine) is None
    assert "sym: false" in refusal(**(fine | {"symmetric": True}))
    tensors = pack(sparse_weight(20, 32, outliers=0.5), "model.layers.0.x")
    config = quantization_config(tensors=tensors, kept_modules=["lm_head"])
    assert (config["bits"], config["beta1"], config["beta2"]) == (3, 16, 16)
    assert config["shapes"]["model.layers.0.x.dense_weights.shape"] == 64
    assert config["shapes"]["model.layers.0.x.row_offsets.shape"] == 21
    assert config["shapes"]["model.layers.0.x.in_perm.shape"] == 16
