from dataclasses import replace

import pytest
import torch

from algorithms.formats import compressed_tensors
from algorithms.formats.awq import VERSIONS, pack, quantization_config, refusal, shape_refusal, unpack
from tests.support.quantized_models import uniform_codes

FINE = {"bits": 4, "symmetric": False, "group_size": 128, "has_column_groups": False}
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]


def weight(rows, columns, group_size=32, *, symmetric=False):
    made = uniform_codes(rows, columns, bits=4, group_size=group_size, symmetric=symmetric)
    if not symmetric:
        made.zeros[0, 0], made.zeros[-1, -1] = 0, 15
    return made


def nibble(number, place):
    return (number.item() >> (4 * place)) & 15


def test_gemm_holds_eight_outputs_a_word():
    made = weight(16, 64)
    tensors = pack(made, "a")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "a.qweight": ((64, 2), torch.int32),
        "a.qzeros": ((2, 2), torch.int32),
        "a.scales": ((2, 16), torch.float16),
    }
    for word in range(2):
        for place in range(8):
            output = 8 * word + NIBBLES[place]
            for column in range(64):
                assert nibble(tensors["a.qweight"][column, word], place) == made.codes[output, column]
            for group in range(2):
                assert nibble(tensors["a.qzeros"][group, word], place) == made.zeros[output, group]
                assert tensors["a.scales"][group, output] == made.scales[output, group]


def test_a_word_of_gemm_by_hand():
    made = weight(8, 32)
    made.codes[:, 0] = torch.arange(1, 9)
    # Outputs 0, 2, 4, 6, 1, 3, 5, 7 hold 1, 3, 5, 7, 2, 4, 6, 8, from the lowest nibble on.
    assert pack(made, "a")["a.qweight"][0, 0].item() & 0xFFFFFFFF == 0x86427531


@pytest.mark.parametrize(("group_size", "columns", "words"), [(32, 64, 4), (64, 128, 2), (128, 256, 1), (32, 1056, 8)])
def test_gemv_runs_along_the_columns_and_fills_up_its_groups(group_size, columns, words):
    made = weight(8, columns, group_size)
    tensors = pack(made, "a", version="gemv")
    groups = columns // group_size
    assert tensors["a.qweight"].shape == (8, columns // 8)
    assert tensors["a.qzeros"].shape == (8, words)
    assert tensors["a.scales"].shape == (8, 8 * words)
    for row in range(8):
        for column in range(columns):
            assert nibble(tensors["a.qweight"][row, column // 8], column % 8) == made.codes[row, column]
        for group in range(8 * words):
            zero, scale = (made.zeros[row, group], made.scales[row, group]) if group < groups else (0, 0)
            assert nibble(tensors["a.qzeros"][row, group // 8], group % 8) == zero
            assert tensors["a.scales"][row, group] == scale


def fast_places(rows, columns):
    """Row and column of every nibble of gemv_fast, in the order of the file, step by step as the layout is told."""
    order = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    order += [place + 4 for place in order]
    line = []
    for start in range(0, columns, 32):
        run = [start + place for place in order]
        for eight in range(0, 32, 8):
            line += [run[eight + place] for place in NIBBLES]
    for four in range(0, rows, 4):
        for start in range(0, columns, 64):
            for row in range(four, four + 4):
                for column in line[start : start + 64]:
                    yield row, column


def test_gemv_fast_interleaves_rows_and_shuffles_columns():
    made = weight(8, 128)
    tensors = pack(made, "a", version="gemv_fast")
    assert tensors["a.qweight"].shape == (2, 128)
    assert tensors["a.qweight"].dtype == torch.int16
    numbers = tensors["a.qweight"].flatten()
    places = list(fast_places(8, 128))
    assert len(set(places)) == 8 * 128
    for index, (row, column) in enumerate(places):
        assert nibble(numbers[index // 4], index % 4) == made.codes[row, column]
    assert tensors["a.scales"].shape == tensors["a.qzeros"].shape == (32, 8)
    assert tensors["a.qzeros"].dtype == torch.float16
    for row in range(8):
        for group in range(32):
            scale, zero = (made.scales[row, group], made.zeros[row, group]) if group < 4 else (torch.tensor(0.0), 0)
            assert tensors["a.scales"][group, row] == scale
            assert tensors["a.qzeros"][group, row] == (-scale * zero).half()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 64, 32), (24, 128, 64), (40, 384, 128), (8, 576, 32)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_packed_comes_back(version, rows, columns, group_size, symmetric):
    made = weight(rows, columns, group_size, symmetric=symmetric)
    made.scales[1] = 2.0**-20  # the smallest that codes are made for, in which products have few digits
    back = unpack(pack(made, "a", version=version), "a", group_size, version=version)
    assert torch.equal(back.codes, made.codes)
    assert torch.equal(back.zeros, made.zeros)
    assert torch.equal(back.scales, made.scales)


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_converts_our_words(symmetric):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    made = weight(24, 96, symmetric=symmetric)
    settings = quantization_config(bits=4, group_size=32, kept_modules=["lm_head", "model.layers.1.mlp.down_proj"])
    converter = converters.AutoAWQConverter.from_autoawq_config(settings)
    kept = "model.layers.1.mlp.down_proj.weight"
    theirs = converter.process(pack(made, "model.layers.0.a") | {kept: torch.ones(2)})
    assert torch.equal(theirs[kept], torch.ones(2))
    assert torch.equal(theirs["model.layers.0.a.weight_packed"], compressed_tensors.pack(made, "a")["a.weight_packed"])
    packed_zeros = theirs["model.layers.0.a.weight_zero_point"]
    zeros = helpers.unpack_from_int32(packed_zeros, 4, torch.Size(made.zeros.shape), packed_dim=0)
    assert torch.equal(zeros + 8, made.zeros)
    assert torch.equal(theirs["model.layers.0.a.weight_scale"], made.scales.half())
    assert not converter._is_targeted("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("symmetric", [False, True])
def test_auto_round_packs_the_same_words_and_decodes_ours(symmetric):
    theirs = pytest.importorskip("auto_round.export.export_to_awq.utils")
    made = weight(24, 96, symmetric=symmetric)
    linear = torch.nn.Linear(96, 24)
    linear.weight.data = made.dequantize()
    packed = theirs.WQLinear_GEMM.from_linear(linear, 4, 32, scales=made.scales.T, zeros=made.zeros.T, device="cpu")
    tensors = pack(made, "a")
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(tensors[f"a.{name}"], getattr(packed, name)), name
    decoded = theirs.dequantize_gemm(*(tensors[f"a.{name}"] for name in ("qweight", "qzeros", "scales")), 4, 32)
    assert torch.equal(decoded.T, made.dequantize().half())


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_understands_the_config(version):
    from transformers import AwqConfig

    kept = "model.layers.1.mlp.down_proj"
    settings = quantization_config(bits=4, group_size=64, version=version, kept_modules=["lm_head", kept])
    theirs = AwqConfig.from_dict(settings)
    assert (theirs.bits, theirs.group_size, theirs.zero_point, theirs.format) == (4, 64, True, version)
    assert theirs.modules_to_not_convert == [kept]
    assert quantization_config(bits=4, group_size=64, kept_modules=["lm_head"])["modules_to_not_convert"] is None


def test_what_the_layout_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"layout gemm needs rows in multiples of 8, unlike a \[12, 32\]"):
        pack(weight(12, 32), "a")
    with pytest.raises(ValueError, match=r"rows in multiples of 8 and columns in multiples of 64, unlike a \[8, 96\]"):
        pack(weight(8, 96), "a", version="gemv_fast")
    with pytest.raises(ValueError, match=r"a has zeros off the grid 0 \.\. 15"):
        pack(replace(weight(8, 32), zeros=torch.full((8, 1), 7.5)), "a")
    with pytest.raises(ValueError, match="codes of 4 bits in groups of neighbouring columns"):
        pack(uniform_codes(8, 32, bits=3), "a")
    with pytest.raises(ValueError, match=r"a\.qzeros reaches"):
        pack(replace(weight(8, 64), scales=torch.full((8, 2), 6e4)), "a", version="gemv_fast")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "wbits is 3"),
        ({"group_size": -1}, "groupsize is -1, the whole row"),
        ({"group_size": 16}, "groupsize is 16."),
        ({"has_column_groups": True}, "static_groups: true"),
    ],
)
def test_settings_that_cannot_be_written_are_explained(settings, said):
    for symmetric in (False, True):
        assert refusal(**(FINE | {"symmetric": symmetric})) is None
    assert said in refusal(**(FINE | settings))


def test_shapes_depend_on_the_version():
    shapes = {"k": (24, 100), "q": (24, 128)}
    assert shape_refusal(shapes) is None
    assert shape_refusal({"k": (20, 64)}).endswith("unlike k [20, 64].")
    assert "multiples of 8, unlike k [24, 100]." in shape_refusal(shapes, "gemv")
    assert shape_refusal({"q": (24, 128)}, "gemv_fast") is None
    assert "k [24, 96]" in shape_refusal({"k": (24, 96)}, "gemv_fast")
