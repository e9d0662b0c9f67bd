import pytest
import torch

from algorithms.formats.gptq import (
    auto_round_config,
    auto_round_refusal,
    auto_round_zero_offset,
    pack,
    quantization_config,
    refusal,
    unpack,
    wraps,
)
from tests.support.quantized_models import uniform_codes

FINE = {"bits": 4, "symmetric": False, "group_size": 128, "has_column_groups": True}


def stream_code(words: list[int], bits: int, place: int) -> int:
    """One code of a dense stream, from the whole stream as one number."""
    stream = sum((word & 0xFFFFFFFF) << (32 * number) for number, word in enumerate(words))
    return stream >> (place * bits) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_codes_run_along_the_inputs_and_zeros_along_the_outputs(bits, group_size):
    weight = uniform_codes(32, 64, bits=bits, group_size=group_size, symmetric=False)
    groups = 1 if group_size == -1 else 2
    tensors = pack(weight, "a")
    assert tensors["a.qweight"].shape == (64 * bits // 32, 32)
    assert tensors["a.qzeros"].shape == (groups, bits)
    assert tensors["a.scales"].shape == (groups, 32)
    for row, column in [(0, 0), (0, 1), (3, 10), (3, 21), (31, 63)]:
        packed = tensors["a.qweight"][:, row].tolist()
        assert stream_code(packed, bits, column) == weight.codes[row, column]
    for row in (0, 10, 21, 31):
        assert stream_code(tensors["a.qzeros"][0].tolist(), bits, row) + 1 == weight.zeros[row, 0]


def test_three_bit_codes_straddle_words_as_the_convention_says():
    weight = uniform_codes(32, 32, bits=3)
    first, second, third = (word & 0xFFFFFFFF for word in pack(weight, "a")["a.qweight"][:, 5].tolist())
    codes = weight.codes[5].tolist()
    assert first >> 30 | (second & 1) << 2 == codes[10]
    assert second >> 31 | (third & 3) << 1 == codes[21]


@pytest.mark.parametrize("zero_offset", [0, 1])
def test_what_is_packed_comes_back(zero_offset):
    weight = uniform_codes(64, 96, bits=4, group_size=32, symmetric=False)
    weight.zeros[0, 0], weight.zeros[1, 1] = 0, 15
    back = unpack(pack(weight, "a", zero_offset=zero_offset), "a", 4, zero_offset=zero_offset)
    assert back.groups is None
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_a_zero_of_nought_wraps_in_the_first_version_alone():
    weight = uniform_codes(32, 32, bits=4)
    assert not wraps(weight)
    weight.zeros[3] = 0
    assert wraps(weight)
    assert stream_code(pack(weight, "a")["a.qzeros"][0].tolist(), 4, 3) == 15
    assert stream_code(pack(weight, "a", zero_offset=0)["a.qzeros"][0].tolist(), 4, 3) == 0


def test_columns_keep_the_groups_of_the_sweep():
    weight = uniform_codes(32, 64, bits=4, group_size=32, symmetric=False)
    groups = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32
    grouped = type(weight)(codes=weight.codes, scales=weight.scales, zeros=weight.zeros, bits=4, groups=groups)
    tensors = pack(grouped, "a")
    assert torch.equal(tensors["a.g_idx"], groups)
    assert torch.equal(unpack(tensors, "a", 4).dequantize(), grouped.dequantize())


def test_sides_and_zeros_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="48 by 32; the GPTQ format needs sides that are multiples of 32"):
        pack(uniform_codes(48, 32, bits=4), "a")
    weight = uniform_codes(32, 32, bits=4)
    weight.zeros[0] = 7.5
    with pytest.raises(ValueError, match=r"a has zeros off the grid 0 \.\. 15"):
        pack(weight, "a")


def test_settings_that_cannot_be_written_are_explained():
    assert refusal(**FINE) is None
    assert "wbits is 5" in refusal(**(FINE | {"bits": 5}))
    assert "static_groups: true" in auto_round_refusal(**FINE)
    assert auto_round_refusal(**(FINE | {"has_column_groups": False})) is None


def test_configs_name_the_version_and_what_is_kept():
    config = quantization_config(
        bits=4, group_size=128, symmetric=True, column_groups=True, kept_modules=["lm_head", "model.layers.0.mlp.up_proj"]
    )
    assert config["checkpoint_format"] == "gptq"
    assert config["desc_act"] is True
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"]
    assert auto_round_config(bits=4, group_size=-1, symmetric=True, kept_modules=[])["packing_format"] == "auto_round:auto_gptq"
    assert auto_round_config(bits=4, group_size=-1, symmetric=False, kept_modules=[])["packing_format"] == "auto_round"
    assert (auto_round_zero_offset(True), auto_round_zero_offset(False)) == (1, 0)
