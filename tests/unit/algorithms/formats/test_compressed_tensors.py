from pathlib import Path

import pytest
import torch

from algorithms.formats.client import record
from algorithms.formats.compressed_tensors import pack, quantization_config, refusal, unpack
from tests.support.models import token_sequences
from tests.support.quantized_models import QuantizedModel, quantized_llama, uniform_codes

SETTINGS = [(2, 16), (3, 32), (4, 32), (4, -1), (8, 64), (3, -1), (8, -1), (2, -1)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_client_library_packs_the_same_words(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = uniform_codes(6, 72, bits=bits, group_size=24)
    theirs = helpers.pack_to_int32((weight.codes.int() - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(pack(weight, "a")["a.weight_packed"], theirs)


@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (3, 8), (5, 16), (8, 24)])
def test_what_is_packed_comes_back(bits, group_size):
    weight = uniform_codes(5, 48, bits=bits, group_size=group_size)
    tensors = pack(weight, "a.b")
    assert tensors["a.b.weight_shape"].tolist() == [5, 48]
    assert tensors["a.b.weight_scale"].dtype == torch.float16
    back = unpack(tensors, "a.b", bits)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())


def client_logits(model: QuantizedModel, out: Path, tokens: torch.Tensor, **settings: object) -> torch.Tensor:
    """What the client computes from a model written in this layout."""
    pytest.importorskip("compressed_tensors")
    packed = {part: tensor for name, codes in model.codes.items() for part, tensor in pack(codes, name).items()}
    model.save(out, packed, quantization_config(**settings))
    return record("compressed-tensors", out, tokens)["logits"]


@pytest.mark.parametrize(("bits", "group_size"), SETTINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_our_logits(tmp_path, bits, group_size, tied):
    model = quantized_llama(tmp_path / "m", bits=bits, group_size=group_size, tied=tied)
    tokens = torch.cat(token_sequences(2, 12))
    theirs = client_logits(model, tmp_path / "out", tokens, bits=bits, group_size=group_size, kept_modules=["lm_head"])
    assert torch.equal(theirs, model.logits(tokens))


def test_kept_linears_stay_as_they_are(tmp_path):
    kept = "model.layers.1.mlp.down_proj"
    model = quantized_llama(tmp_path / "m", bits=4, group_size=32).keeping(kept)
    tokens = torch.cat(token_sequences(2, 12))
    theirs = client_logits(model, tmp_path / "out", tokens, bits=4, group_size=32, kept_modules=["lm_head", kept])
    assert torch.equal(theirs, model.logits(tokens))


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"bits": 9}, "wbits is 9"), ({"symmetric": False}, "sym: true"), ({"has_column_groups": True}, "static_groups: true")],
)
def test_what_cannot_be_written_is_explained(settings, key):
    fine = {"bits": 4, "symmetric": True, "group_size": 128, "has_column_groups": False}
    assert refusal(**fine) is None
    assert key in refusal(**(fine | settings))


def test_scales_beyond_float16_are_refused():
    weight = uniform_codes(2, 8, bits=4)
    weight.scales[:] = 1e5
    with pytest.raises(ValueError, match=r"a\.weight_scale reaches 1e\+05"):
        pack(weight, "a")
