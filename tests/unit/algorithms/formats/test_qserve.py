from dataclasses import replace

import pytest
import torch

from algorithms.formats import progressive, uniform
from algorithms.formats.qserve import (
    dense_state,
    pack_channel,
    pack_group,
    pack_wide,
    quantization_config,
    repacked,
    shape_refusal,
    unpack_channel,
    unpack_group,
    unpack_wide,
)
from algorithms.numerics.uniform import UniformCodes
from tests.support.quantized_models import progressive_codes, uniform_codes

MASK = 0xFFFFFFFF


def channel_weight(rows, columns):
    made = uniform_codes(rows, columns, bits=4, symmetric=False)
    made.zeros[0], made.zeros[1], made.scales[2] = 0, 15, 2.0**-20
    return made


def byte(tensor, *place):
    return tensor[place].item() & 0xFF


def assert_codes_lie_where_the_table_says(qweight, codes):
    rows, columns = codes.shape
    assert qweight.shape == (rows, columns // 2)
    assert qweight.dtype == torch.int8
    stored = qweight.flatten()
    place = 0
    for tile_row in range(rows // 32):
        for tile_column in range(columns // 32):
            for lane in range(8):
                for left in range(4):
                    for half_column in range(2):
                        for half_row in range(2):
                            for right in range(4):
                                row = tile_row * 32 + half_row * 8 + lane
                                column = tile_column * 32 + half_column * 16 + left * 4 + right
                                assert byte(stored, place) & 15 == codes[row, column]
                                assert byte(stored, place) >> 4 == codes[row + 16, column]
                                place += 1
    assert place == stored.numel()


def test_codes_and_statistics_of_rows_lie_where_the_table_says():
    made = channel_weight(64, 96)
    tensors = pack_channel(made, "a")
    assert_codes_lie_where_the_table_says(tensors["a.qweight"], made.codes)
    assert tensors["a.s1_scales"].dtype == tensors["a.s1_szeros"].dtype == torch.float16
    assert set(tensors) == {"a.qweight", "a.s1_scales", "a.s1_szeros"}
    for row in range(64):
        assert tensors["a.s1_scales"][row] == made.scales[row, 0]
        assert tensors["a.s1_szeros"][row] == (made.scales[row, 0] * made.zeros[row, 0]).half()


def test_codes_and_statistics_of_groups_lie_where_the_table_says():
    made = progressive_codes(64, 256)
    tensors = pack_group(made, "a")
    assert_codes_lie_where_the_table_says(tensors["a.qweight"], made.codes)
    assert torch.equal(tensors["a.s1_scales"].float(), made.row_scales)
    assert set(tensors) == {"a.qweight", "a.s1_scales", "a.s2_scales", "a.s2_zeros"}
    order = [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]
    order += [place + 4 for place in order]
    for name in ("a.s2_scales", "a.s2_zeros"):
        assert tensors[name].shape == (2, 64)
        assert tensors[name].dtype == torch.int8
    for group in range(2):
        for place in range(64):
            row = place // 32 * 32 + order[place % 32]
            scale, zero = made.group_scales[row, group].item(), made.zeros[row, group].item()
            assert byte(tensors["a.s2_scales"], group, place) == scale
            assert byte(tensors["a.s2_zeros"], group, place) == -zero * scale % 256


def word(flat, start):
    """Four neighbouring bytes as the 32-bit number that a thread loads."""
    return sum(byte(flat, start + place) << (8 * place) for place in range(4))


def added_bytes(left, right):
    """Sums of the four bytes of two words, each modulo 256."""
    return [((left >> (8 * place)) + (right >> (8 * place))) & 0xFF for place in range(4)]


def kernel_integers(tensors, rows, columns):
    """The 8-bit weights that QServe's per-group kernel works with, as its 32 threads load, multiply and add."""
    qweight, scales, zeros = (tensors[f"a.{name}"].flatten() for name in ("qweight", "s2_scales", "s2_zeros"))
    result = torch.zeros(rows, columns, dtype=torch.int64)
    for tile in range(rows * columns // 1024):
        top, left = tile // (columns // 32) * 32, tile % (columns // 32) * 32
        for thread in range(32):
            words = [word(qweight, tile * 512 + thread * 16 + 4 * part) for part in range(4)]
            statistics = left // 128 * rows + top + thread // 4 * 4
            packed_scales, packed_zeros = word(scales, statistics), word(zeros, statistics)
            for eighth in range(4):  # rows that lie 8 apart
                scale = packed_scales >> (8 * eighth) & 0xFF
                zero = (packed_zeros >> (8 * eighth) & 0xFF) * 0x01010101
                for half in range(2):
                    codes = words[eighth % 2 + 2 * half] >> (4 * (eighth // 2)) & 0x0F0F0F0F
                    column = left + 16 * half + thread % 4 * 4
                    values = added_bytes(codes * scale & MASK, zero)
                    signed = [value - 256 if value > 127 else value for value in values]
                    result[top + 8 * eighth + thread // 4, column : column + 4] = torch.tensor(signed)
    return result


def rounded_tokens(tokens, columns):
    """Random inputs, and their 8-bit integers with a scale each."""
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = inputs.abs().amax(1, keepdim=True) / 127
    return torch.round(inputs / scales).long(), scales


def test_the_kernel_s_arithmetic_in_words_gives_the_matrix():
    made = progressive_codes(64, 256)
    made.codes[5, :128], made.group_scales[5, 0], made.zeros[5, 0] = made.codes[5, :128].clamp(max=14), 17, 7  # the largest
    tensors = pack_group(made, "a")
    weights = kernel_integers(tensors, 64, 256)
    assert torch.equal(weights, made.intermediate().long())
    integers, scales = rounded_tokens(5, 256)
    outputs = (integers @ weights.T).double() * tensors["a.s1_scales"].double() * scales
    expected = (integers.double() * scales) @ made.dequantize().double().T
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_the_kernel_s_arithmetic_with_eight_bit_sums_gives_the_matrix():
    made = progressive_codes(32, 384, seed=3)
    made.codes[5, :128], made.group_scales[5, 0], made.zeros[5, 0] = made.codes[5, :128].clamp(min=8), 17, 15
    tensors = pack_group(made, "a")
    order = [row for lane in range(8) for row in range(lane, 32, 8)]
    scales, zeros = torch.empty(3, 32, dtype=torch.int8), torch.empty(3, 32, dtype=torch.int8)
    scales[:, order], zeros[:, order] = tensors["a.s2_scales"], tensors["a.s2_zeros"]
    assert zeros[0, 5] == 1  # -15 * 17, which has wrapped
    wide = [part.T.repeat_interleave(128, 1) for part in (scales, zeros)]
    weights = made.codes.to(torch.int8) * wide[0] + wide[1]  # int8 wraps around
    assert weights.dtype == torch.int8
    integers, token_scales = rounded_tokens(4, 384)
    outputs = (integers @ weights.long().T).double() * tensors["a.s1_scales"].double() * token_scales
    expected = (integers.double() * token_scales) @ made.dequantize().double().T
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_the_per_channel_kernel_s_sums_give_the_matrix():
    made = channel_weight(64, 96)
    tensors = pack_channel(made, "a")
    integers, scales = rounded_tokens(5, 96)
    products = (integers @ made.codes.long().T).double() * tensors["a.s1_scales"].double()
    sums = integers.sum(1, keepdim=True).double()
    outputs = scales * (products - tensors["a.s1_szeros"].double() * sums)
    expected = (integers.double() * scales) @ made.dequantize().double().T
    # Scale times zero is a float16 number: half a unit in its last place, for each unit of the inputs' sum.
    slack = (2.0**-11 * made.scales * made.zeros).double().T * (scales * sums).abs() + 1e-12
    assert ((outputs - expected).abs() <= slack).all()
    assert ((outputs - expected).abs() > 1e-12).any()


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (96, 64), (32, 160)])
def test_rows_come_back(rows, columns):
    made = channel_weight(rows, columns)
    back = unpack_channel(pack_channel(made, "a"), "a")
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(made, name)), name


@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (96, 256), (64, 640)])
def test_groups_come_back(rows, columns):
    made = progressive_codes(rows, columns)
    back = unpack_group(pack_group(made, "a"), "a")
    for name in ("codes", "row_scales", "group_scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(made, name)), name


def test_a_state_holds_decoded_weights_and_everything_else():
    row, group = channel_weight(32, 64), progressive_codes(32, 128)
    others = {"a.bias": torch.ones(32).half(), "norm.weight": torch.ones(64).half()}
    state = dense_state(pack_channel(row, "a") | pack_group(group, "b") | others)
    assert set(state) == {"a.weight", "b.weight", "a.bias", "norm.weight"}
    assert torch.equal(state["a.weight"], row.dequantize())
    assert torch.equal(state["b.weight"], group.dequantize())


def test_what_a_calibration_stores_is_written_in_this_layout():
    others = {"a.bias": torch.ones(32).half(), "norm.weight": torch.ones(64).half()}
    rows, groups = channel_weight(32, 64), progressive_codes(32, 128)
    for stored, expected in (
        (uniform.pack(rows, "a"), pack_channel(rows, "a")),
        (progressive.pack(groups, "a"), pack_group(groups, "a")),
    ):
        written = repacked(stored | others)
        assert set(written) == set(expected | others)
        assert all(torch.equal(written[name], tensor) for name, tensor in (expected | others).items())


def test_what_the_layout_cannot_hold_is_named():
    row, group = uniform_codes(32, 64, bits=4), progressive_codes(32, 128)
    with pytest.raises(ValueError, match=r"rows in multiples of 32 and columns of 32, unlike a \[48, 64\]"):
        pack_channel(uniform_codes(48, 64, bits=4), "a")
    with pytest.raises(ValueError, match="one scale a row"):
        pack_channel(uniform_codes(32, 64, bits=4, group_size=32), "a")
    with pytest.raises(ValueError, match=r"zeros off the grid 0 \.\. 15"):
        pack_channel(replace(row, zeros=row.zeros + 0.5), "a")
    with pytest.raises(ValueError, match=r"columns of 128, unlike a \[32, 64\]"):
        pack_group(progressive_codes(32, 64, group_size=32), "a")
    with pytest.raises(ValueError, match="groups of 128 columns"):
        pack_group(progressive_codes(32, 128, group_size=64), "a")
    with pytest.raises(ValueError, match="group scales of 1 to 17"):
        pack_group(replace(group, group_scales=torch.full((32, 1), 18, dtype=torch.uint8)), "a")
    for wide in (uniform_codes(32, 64, bits=8, symmetric=False), uniform_codes(32, 64, bits=8, group_size=32), row):
        with pytest.raises(ValueError, match="symmetric codes with one scale a row"):
            pack_wide(wide, "a")
    with pytest.raises(ValueError, match="reach 255, beyond 8 bits"):
        pack_group(replace(group, group_scales=torch.full_like(group.zeros, 17), zeros=torch.zeros_like(group.zeros)), "a")


def test_a_matrix_of_eight_bits_by_hand():
    made = UniformCodes(
        codes=torch.tensor([[0, 128, 255], [127, 1, 200]], dtype=torch.uint8),
        scales=torch.tensor([[0.5], [2.0]]),
        zeros=torch.full((2, 1), 128.0),
        bits=8,
    )
    tensors = pack_wide(made, "a")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "a.weight": (torch.int8, [[-128, 0, 127], [-1, -127, 72]]),
        "a.dequant_scale": (torch.float16, [0.5, 2.0]),
    }
    assert dense_state(tensors | {"a.bias": torch.ones(2)})["a.weight"].tolist() == [[-64.0, 0.0, 63.5], [-2.0, -254.0, 144.0]]


def test_eight_bits_come_back_and_multiply_as_integers():
    made = uniform_codes(48, 40, bits=8)
    tensors = pack_wide(made, "a")
    back = unpack_wide(tensors, "a")
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(made, name)), name
    integers, scales = rounded_tokens(5, 40)
    outputs = (integers @ tensors["a.weight"].long().T).double() * tensors["a.dequant_scale"].double() * scales
    expected = (integers.double() * scales) @ made.dequantize().double().T
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    stored = uniform.pack(made, "a") | {"a.bias": torch.ones(48).half()}
    written = repacked(stored)
    assert set(written) == {"a.weight", "a.dequant_scale", "a.bias"}
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_shapes_and_the_config():
    assert shape_refusal({"a": (32, 160)}) is None
    assert "unlike a [32, 160]" in shape_refusal({"a": (32, 160), "b": (64, 256)}, 128)
    settings = quantization_config(group_size=128, kv_bits=4)
    # What SGLang's QoQConfig asks for, by its source.
    assert (settings["quant_method"], settings["wbits"], settings["group_size"]) == ("qoq", 4, 128)
    assert (settings["a_bit"], settings["kv_bits"], settings["s2_order"]) == (8, 4, [0, 8, 16, 24])
    assert quantization_config(group_size=-1)["s2_order"] is None
    assert shape_refusal({"a": (48, 40)}, bits=8) is None
    assert quantization_config(group_size=-1, bits=8)["wbits"] == 8
