import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.own.packed_linear import PackedLinear
from algorithms.formats.reallm.packed import LAYOUT, load_packed, pack, quantization_config, stored_bits, unpack
from algorithms.formats.reallm.peft import adapter_config, adapter_tensors
from algorithms.modeling.source import ModelError
from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.weight import LowRankWeight
from tests.support.matrices import CODERS, problem
from tests.support.models import save_family

SHAPE = (37, 83)
KINDS = {"vq permuted": "vq", "nf2": "nf", "aqlm of two books": "aqlm", "vq of ten bits": "vq"}


def _weight(name, rank=3, bits=8):
    matrix, hessian = problem(*SHAPE)
    generator = torch.Generator().manual_seed(0)
    found = alternate(matrix, hessian, CODERS[name](), generator, rank=rank, factor_bits=bits, iterations=1)
    return LowRankWeight.of(found, KINDS[name])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rank", "bits"), [(3, 8), (3, 16), (0, 5)])
def test_a_weight_comes_back_and_bits_are_those_of_its_tensors(name, rank, bits):
    weight = _weight(name, rank, bits)
    stored = pack(weight, "a.b")
    back = unpack({**stored, "a.c": torch.ones(2)}, "a.b")
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.kind, back.low_rank.bits, back.low_rank.rank) == (KINDS[name], bits, rank)
    counted = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert sum(stored_bits(weight).values()) == counted
    dense = LAYOUT.dense_state({**stored, "a.norm": torch.ones(2).half()})
    assert dense.keys() == {"a.b.weight", "a.norm"}
    assert torch.equal(dense["a.b.weight"], weight.dequantize())


def test_the_linear_computes_from_packed_tensors_in_any_dtype():
    weight, bias = _weight("vq permuted"), torch.randn(SHAPE[0])
    linear = PackedLinear(LAYOUT, LAYOUT.of(pack(weight, "a"), "a"), bias)
    inputs = torch.randn(5, SHAPE[1])
    expected = inputs.double() @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(linear(inputs).double(), expected, atol=1e-4, rtol=1e-4)
    half = linear.to(torch.bfloat16)
    torch.testing.assert_close(half(inputs.bfloat16()).double(), expected, atol=0.3, rtol=0.1)
    assert torch.equal(half.decoded(), weight.dequantize())


def test_a_value_beyond_float16_is_refused():
    weight = _weight("nf2")
    with pytest.raises(ModelError, match="p: magnitude holds a value beyond float16"):
        pack(
            LowRankWeight(kind="nf", residual=weight.residual, low_rank=weight.low_rank, magnitude=weight.magnitude * 1e6), "p"
        )


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    folder = save_family(tmp_path, "llama")
    assert quantization_config(kind="vq", kept_modules=("lm_head",))["quant_method"] == "bitpress-reallm"
    config = json.loads((folder / "config.json").read_text())
    (file,) = folder.glob("*.safetensors")
    assert config["model_type"] == "llama"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing \['model.norm.weight'\]"):
        load_packed(folder)


def test_an_adapter_has_a_rank_for_every_linear():
    weight = _weight("vq permuted", rank=0)
    tensors = adapter_tensors(weight)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "lora_A.weight": (1, 83),
        "lora_B.weight": (37, 1),
        "lora_magnitude_vector": (37,),
    }
    assert not tensors["lora_A.weight"].any()
    config = adapter_config({"model.layers.0.q_proj": 4, "model.layers.0.k_proj": 8, "model.layers.1.q_proj": 8})
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {"model.layers.0.q_proj": 4})
    assert config["target_modules"] == ["k_proj", "q_proj"]
