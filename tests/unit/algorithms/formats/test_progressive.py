import pytest
import torch

from algorithms.formats import uniform
from algorithms.formats.progressive import dense_state, pack, packed_linears, rest, stored_bits, unpack
from tests.support.quantized_models import progressive_codes, uniform_codes


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(5, 48, 16), (32, 256, 128), (3, 40, 8)])
def test_what_is_packed_comes_back(rows, columns, group_size):
    made = progressive_codes(rows, columns, group_size=group_size)
    tensors = pack(made, "a.b")
    assert tensors["a.b.shape"].tolist() == [rows, columns, 4]
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a.b.codes": torch.int32,
        "a.b.row_scales": torch.float16,
        "a.b.group_scales": torch.uint8,
        "a.b.zeros": torch.uint8,
        "a.b.shape": torch.int64,
    }
    back = unpack(tensors, "a.b")
    for name in ("codes", "row_scales", "group_scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(made, name)), name
    assert back.bits == 4


def test_codes_are_a_stream_of_nibbles():
    made = progressive_codes(3, 40, group_size=8)
    words = pack(made, "a")["a.codes"]
    assert words.shape == (3, 5)
    for row in range(3):
        for column in range(40):
            assert words[row, column // 8].item() >> (4 * (column % 8)) & 15 == made.codes[row, column]


def test_a_state_holds_decoded_weights_and_everything_else():
    made = progressive_codes(4, 32, group_size=16)
    others = {"a.bias": torch.ones(4).half(), "norm.weight": torch.ones(2).half()}
    tensors = pack(made, "a") | others
    assert packed_linears(list(tensors)) == ["a"]
    assert rest(tensors) == others
    state = dense_state(tensors)
    assert set(state) == {"a.weight", "a.bias", "norm.weight"}
    assert torch.equal(state["a.weight"], made.dequantize())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_plain_codes_are_not_taken_for_progressive_ones():
    assert packed_linears(list(uniform.pack(uniform_codes(4, 32, bits=4), "a"))) == []


def test_bits_are_those_of_a_hand_count():
    made = progressive_codes(6, 256)
    assert stored_bits(made) == {"codes": 6 * 256 * 4, "scales": 6 * 16 + 6 * 2 * 8, "zeros": 6 * 2 * 4}


def test_scales_beyond_float16_are_refused():
    made = progressive_codes(2, 16, group_size=8)
    made.row_scales[:] = 1e5
    with pytest.raises(ValueError, match=r"a\.row_scales reaches 1e\+05"):
        pack(made, "a")
