import pytest
import torch

from algorithms.formats.aqlm import dense_state, pack, quantization_config, unpack
from tests.support.matrices import random_codes


@pytest.mark.parametrize(("bits", "container"), [(4, torch.int8), (8, torch.int8), (9, torch.int16), (12, torch.int16)])
def test_codes_survive_the_signed_container(bits, container):
    weight = random_codes(4, 8, num_codebooks=2, num_codewords=1 << bits)
    weight.codes[0, 0, 0] = (1 << bits) - 1
    weight.codes[0, 0, 1] = 1 << (bits - 1)
    weight.codes[0, 1, 0] = (1 << (bits - 1)) - 1
    tensors = pack(weight, "a.b")
    assert tensors["a.b.codes"].dtype == container
    assert tensors["a.b.codes"][0, 0, 0] == -1
    assert tensors["a.b.codes"][0, 0, 1] == -(1 << (bits - 1))
    assert tensors["a.b.scales"].shape == (4, 1, 1, 1)
    assert torch.equal(unpack(tensors, "a.b").codes, weight.codes)


def test_dense_state_equals_the_decoded_matrix():
    weight = random_codes(4, 8, num_codebooks=2, num_codewords=16, group_shape=(2, 4))
    state = dense_state({**pack(weight, "x"), "norm.weight": torch.ones(3, dtype=torch.float16)})
    rounded = weight.replace(codebooks=weight.codebooks.half().float(), scales=weight.scales.half().float())
    assert torch.equal(state["x.weight"], rounded.dequantize())
    assert state["norm.weight"].dtype == torch.float32


def test_kept_modules_are_written_in_both_spellings():
    config = quantization_config(num_codebooks=1, bits=4, group_shape=(1, 8), kept_modules=["lm_head"])
    assert config["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]


def test_values_beyond_float16_are_refused():
    weight = random_codes(4, 8, num_codebooks=1, num_codewords=16)
    with pytest.raises(ValueError, match=r"a\.scales reaches 1e\+05"):
        pack(weight.replace(scales=torch.full((4,), 1e5)), "a")
