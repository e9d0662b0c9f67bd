from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms.formats.client import record
from algorithms.formats.gguf.file import architecture_refusal, blocks, refusal, write
from algorithms.modeling.source import ModelSource
from tests.support.models import token_sequences
from tests.support.quantized_models import QuantizedModel, quantized_llama, uniform_codes

gguf = pytest.importorskip("gguf")


def parameters(model: QuantizedModel) -> Iterator:
    yield from model.kept.items()
    for name, codes in model.codes.items():
        yield f"{name}.weight", codes


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_the_client_library_decodes_our_blocks(bits, kind, group_size):
    weight = uniform_codes(3, 128, bits=bits, group_size=group_size)
    packed = blocks(weight, "a").numpy()
    assert packed.shape == (3, 4 * (18 if bits == 4 else 34))
    decoded = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(decoded), weight.dequantize())


def test_a_block_by_hand():
    weight = uniform_codes(1, 32, bits=4, group_size=32)
    weight.scales[:] = 1.0
    block = blocks(weight, "a")[0].tolist()
    codes = weight.codes[0].tolist()
    assert block[:2] == [0x00, 0x3C]  # 1 in float16
    assert block[2:] == [codes[j] + 16 * codes[j + 16] for j in range(16)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{"group_size": 32}, {"group_size": -1, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}])
def test_transformers_computes_our_logits(tmp_path, bits, tied, changes):
    model = quantized_llama(tmp_path / "m", bits=bits, tied=tied, **changes)
    out = tmp_path / "out"
    out.mkdir()
    file = write(
        out, source_config=model.source.raw_config(), tensors=parameters(model), tokenizer_folder=model.source.directory
    )
    assert [path.name for path in out.iterdir()] == [file.name] == ["model.gguf"]
    tokens = torch.cat(token_sequences(2, 12))
    assert torch.equal(record("gguf", out, tokens)["logits"], model.logits(tokens))


def test_heads_wider_than_the_model_and_plain_weights_are_kept(tmp_path):
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=24
    )
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "m")
    source = ModelSource(tmp_path / "m")
    (tmp_path / "out").mkdir()
    state = source.tensors(source.weight_files, torch.float32)
    write(tmp_path / "out", source_config=source.raw_config(), tensors=state.items())
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(record("gguf", tmp_path / "out", tokens)["logits"], source.model_from(state)(tokens).logits)


def test_tensors_that_llama_does_not_have_are_named(tmp_path):
    tensors = [("model.layers.0.self_attn.q_norm.weight", torch.ones(8))]
    with pytest.raises(ValueError, match=r"no place for model\.layers\.0\.self_attn\.q_norm\.weight"):
        write(tmp_path, source_config={"num_hidden_layers": 1, "num_attention_heads": 1}, tensors=tensors)


def test_a_failure_leaves_nothing_behind(tmp_path):
    model = quantized_llama(tmp_path / "m", bits=4, group_size=16)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="groupsize: 32 or a multiple of it, not 16"):
        write(tmp_path / "out", source_config=model.source.raw_config(), tensors=parameters(model))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"bits": 3}, "wbits is 3"),
        ({"symmetric": False}, "sym: true"),
        ({"group_size": 48}, "groupsize: 32"),
        ({"has_column_groups": True}, "static_groups: true"),
    ],
)
def test_settings_that_cannot_be_written_are_explained(settings, key):
    fine = {"bits": 4, "symmetric": True, "group_size": 128, "has_column_groups": False}
    assert refusal(**fine) is None
    assert key in refusal(**(fine | settings))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen2"}, "this one is qwen2"),
        ({"attention_bias": True}, "this one has attention_bias"),
        ({"hidden_act": "gelu"}, "this model gelu"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "this model has llama3"),
    ],
)
def test_models_that_cannot_be_written_are_explained(config, said):
    assert architecture_refusal({"model_type": "llama", "rope_scaling": None}) is None
    assert said in architecture_refusal({"model_type": "llama"} | config)
