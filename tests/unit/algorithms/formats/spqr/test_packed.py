import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms.formats.client import record
from algorithms.formats.own.packed_linear import PackedLinear
from algorithms.formats.spqr.packed import (
    LAYOUT,
    dense_state,
    linear_parts,
    load_packed,
    pack,
    quantization_config,
    stored_bits,
    unpack,
)
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.source import ModelSource
from algorithms.numerics.sparse_quantized import Outliers
from tests.support.matrices import sparse_weight
from tests.support.models import save_family, token_sequences

SETTINGS = [
    {},
    {"bits": 4, "statistic_bits": 16, "ordered": False},
    {"bits": 2, "group_size": 32, "statistic_bits": 5, "run": 7, "outliers": 0.3},
    {"bits": 8, "outliers": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_packed_comes_back(settings, tmp_path):
    weight = sparse_weight(21, 64, **settings)
    save_file(pack(weight, "a.b"), tmp_path / "t.safetensors")
    back = unpack(load_file(tmp_path / "t.safetensors"), "a.b")
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.outliers.offsets, weight.outliers.offsets)
    assert torch.equal(back.outliers.columns, weight.outliers.columns)
    assert (back.order is None) == (weight.order is None)
    assert (back.bits, back.group_size, back.scales.run) == (weight.bits, weight.group_size, weight.scales.run)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("columns", "stored"), [(65536, torch.int16), (65600, torch.int32)])
def test_columns_take_the_fewest_bytes(columns, stored):
    weight = sparse_weight(1, columns, outliers=0.0, ordered=False)
    mask = torch.zeros(1, columns, dtype=torch.bool)
    mask[0, [0, 32767, 32768, columns - 1]] = True
    weight = replace(weight, outliers=Outliers.of(mask, torch.ones(1, columns)))
    tensors = pack(weight, "a")
    assert tensors["a.outlier_columns"].dtype == tensors["a.order"].dtype == stored
    back = unpack(tensors, "a")
    assert back.outliers.columns.tolist() == [0, 32767, 32768, columns - 1]
    assert torch.equal(back.order, weight.order)


def test_stored_bits_are_those_of_the_file():
    weight = sparse_weight(32, 64, outliers=0.1, ordered=False)
    tensors = pack(weight, "a")
    bits = stored_bits(tensors, "a")
    count = weight.outliers.values.numel()
    assert bits == {
        "codes": 32 * 64 * 3,
        "scales": 32 * 4 * 3,
        "zeros": 32 * 4 * 3,
        "second_level": 2 * 4 * 4 * 16,
        "outliers": count * 32,
        "row_pointers": 33 * 32,
        "permutation": 64 * 16,
        "header": 8 * 64,
    }
    assert sum(bits.values()) == sum(8 * tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_linear_computes_with_the_decoded_weight(dtype):
    weight = sparse_weight(24, 64, ordered=False, outliers=0.1)
    bias = torch.randn(24)
    linear = PackedLinear(LAYOUT, linear_parts(pack(weight, "a"), "a"), bias)
    inputs = torch.randn(2, 5, 64).to(dtype)
    expected = torch.nn.functional.linear(inputs, weight.dequantize().to(dtype), bias.to(dtype))
    assert torch.equal(linear(inputs), expected)
    assert torch.equal(linear.to(dtype)(inputs), expected)  # the buffers keep their bits
    assert {part: tensor.dtype for part, tensor in linear.named_buffers()} == {
        part: tensor.dtype for part, tensor in linear_parts(pack(weight, "a"), "a").items()
    }


def packed_folder(tmp_path: Path, family: str, *, tied: bool) -> tuple[Path, torch.nn.Module]:
    """A model folder with packed linears in its blocks, and the dense model that it stands for."""
    source = ModelSource(save_family(tmp_path / "m", family, tied=tied))
    state = source.tensors(source.weight_files)
    tensors = {}
    for seed, name in enumerate(sorted(name for name in state if name.endswith("_proj.weight"))):
        O, I = state.pop(name).shape
        tensors |= pack(sparse_weight(O, I, ordered=seed % 2 == 0, seed=seed), name.removesuffix(".weight"))
    out = tmp_path / "out"
    out.mkdir()
    save_file(state | tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = quantization_config(bits=3, group_size=16, kept_modules=["lm_head"])
    (out / "config.json").write_text(json.dumps(source.raw_config() | {"quantization_config": settings}))
    copy_companions(source.directory, out)
    return out, source.model_from(dense_state(state | tensors))


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False)])
def test_the_packed_model_computes_the_dense_model_s_logits(tmp_path, family, tied):
    out, dense = packed_folder(tmp_path, family, tied=tied)
    model = load_packed(out)
    for name, parameter in dense.named_parameters():
        if name.endswith("_proj.weight"):
            packed = model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(packed.decoded(), parameter)
    tokens = torch.cat(token_sequences(2, 12))
    expected = dense(input_ids=tokens, use_cache=False).logits
    answer = record("spqr", out, tokens)
    assert (answer["logits"] - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(answer["greedy"][:, 0], expected[:, -1].argmax(-1))


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    out, _ = packed_folder(tmp_path, "llama", tied=False)
    state = load_file(out / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        load_packed(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_decodes_the_same_weight():
    weight = sparse_weight(24, 64, ordered=False, outliers=0.1)
    linear = PackedLinear(LAYOUT, linear_parts(pack(weight, "a"), "a")).cuda()
    inputs = torch.randn(3, 64)
    assert torch.equal(linear.decoded().cpu(), weight.dequantize())
    assert torch.allclose(linear(inputs.cuda()).cpu(), inputs @ weight.dequantize().T, atol=1e-4)
