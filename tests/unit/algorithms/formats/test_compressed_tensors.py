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


def rounded_tokens(hidden: torch.Tensor, bits: int) -> torch.Tensor:
    """Inputs [batch, tokens, channels] on the grid of each token, the formula written out number by number."""
    half = 2 ** (bits - 1)
    result = hidden.clone()
    for token in result.view(-1, hidden.shape[-1]):
        scale = token.abs().max() / ((2 * half - 1) / 2)
        if scale == 0:
            continue
        token.copy_(torch.round(torch.clamp(token / scale, -half, half - 1)) * scale)
    return result


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, -1])
def test_transformers_rounds_activations_token_by_token(tmp_path, activation_bits, group_size):
    model = quantized_llama(tmp_path / "m", bits=4, group_size=group_size)
    tokens = torch.cat(token_sequences(2, 12))
    theirs = client_logits(
        model,
        tmp_path / "out",
        tokens,
        bits=4,
        group_size=group_size,
        kept_modules=["lm_head"],
        activation_bits=activation_bits,
    )
    ours = model.dense()
    for name in model.codes:
        ours.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounded_tokens(args[0], activation_bits),))
    with torch.no_grad():
        expected = ours(input_ids=tokens, use_cache=False).logits
    plain = (expected - model.logits(tokens)).norm() / expected.norm()
    assert (theirs - expected).norm() / expected.norm() <= 1e-4 < 10e-4 < plain


@pytest.mark.parametrize("shape", [(2, 5, 48), (2, 1, 16)])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_client_library_rounds_tokens_as_is_said(shape, bits):
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settings = quantization_config(bits=4, group_size=32, kept_modules=[], activation_bits=bits)
    arguments = quantization.QuantizationArgs(**settings["config_groups"]["group_0"]["input_activations"])
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    hidden[0, 0] = 0
    hidden[1, 0, 0] = -hidden[1, 0].abs().max() - 1  # the end of the grid that has one code more
    linear = torch.nn.Linear(shape[-1], 1)
    linear.quantization_status = quantization.QuantizationStatus.COMPRESSED
    theirs = lifecycle.forward_quantize(linear, hidden, "input", arguments)
    assert torch.equal(theirs, rounded_tokens(hidden, bits))
    flat = lifecycle.forward_quantize(linear, hidden[1], "input", arguments)
    assert torch.equal(flat, rounded_tokens(hidden[1].reshape(1, 1, -1), bits).view_as(flat))


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
