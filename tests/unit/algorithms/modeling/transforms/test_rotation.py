import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from algorithms.modeling import source as source_module
from algorithms.modeling.activations import embed
from algorithms.modeling.families.table import architecture_for
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.rotation import RotatedSource
from algorithms.numerics.activations.hadamard import hadamard
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig
from tests.support.models import FAMILIES, confident, save_family, token_sequences
from tests.unit.algorithms.quantization.plugin_runs import TEXT, base_logits, logits, run

FOLDED = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def _model(folder, family="llama", **changes):
    """Logits of a few units, so that what is left out of a rotation shows."""
    return confident(save_family(folder, family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_the_rotated_model_computes_what_the_original_does(tmp_path, family, tied, random):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    original = ModelSource(_model(tmp_path / "m", family, tied=tied, hidden=48, **biases))
    rotated = RotatedSource(original, random=random, seed=3)
    expected, found = base_logits(original), base_logits(rotated)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    names = {name for name, _ in original.skeleton().named_parameters()} | {"lm_head.weight"}
    tensors = rotated.tensors(rotated.weight_files)
    assert set(tensors) == names
    unrotated = original.tensors(original.weight_files)
    same = [name for name in tensors if torch.equal(tensors[name], unrotated.get(name, torch.empty(0)))]
    assert all("norm" in name or "bias" in name for name in same)
    offset = original.architecture.norm_offset
    assert all(torch.all(tensors[name] == 1 - offset) for name in tensors if name.endswith(FOLDED))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_the_streams_differ_by_the_rotation(tmp_path, family):
    original = ModelSource(_model(tmp_path / "m", family, hidden=48, tied=True))
    rotated = RotatedSource(original)
    streams = [_embedded(source) for source in (original, rotated)]
    matrix = hadamard(48).float()
    torch.testing.assert_close(streams[1].batches[0], streams[0].batches[0] @ matrix, atol=1e-4, rtol=1e-5)
    for index in range(2):
        for source, stream in zip((original, rotated), streams, strict=True):
            stream.advance(source.load_block(index), index)
        torch.testing.assert_close(streams[1].batches[0], streams[0].batches[0] @ matrix, atol=1e-4, rtol=1e-5)
    hidden = streams[1].batches[0]
    outside = rotated.load_outside()
    found = outside.get_output_embeddings()(outside.model.norm(hidden))
    expected = original.model_from(original.tensors(original.weight_files))(torch.cat(token_sequences(3, 12))).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_every_tensor_is_the_formula_in_float64(tmp_path):
    folder = _model(tmp_path / "m", hidden=48, attention_bias=True)
    rotated = RotatedSource(ModelSource(folder)).tensors(RotatedSource(ModelSource(folder)).weight_files, torch.float64)
    stored = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    R, block = hadamard(48), "model.layers.1."
    gains = torch.diag(stored[f"{block}input_layernorm.weight"])
    expected = {
        "model.embed_tokens.weight": stored["model.embed_tokens.weight"] @ R,
        "lm_head.weight": stored["lm_head.weight"] @ torch.diag(stored["model.norm.weight"]) @ R,
        f"{block}self_attn.v_proj.weight": stored[f"{block}self_attn.v_proj.weight"] @ gains @ R,
        f"{block}self_attn.v_proj.bias": stored[f"{block}self_attn.v_proj.bias"],
        f"{block}self_attn.o_proj.weight": R.T @ stored[f"{block}self_attn.o_proj.weight"],
        f"{block}self_attn.o_proj.bias": stored[f"{block}self_attn.o_proj.bias"] @ R,
        f"{block}mlp.down_proj.weight": R.T @ stored[f"{block}mlp.down_proj.weight"],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(rotated[name], tensor, atol=1e-12, rtol=0)


def test_half_precision_weights_are_rotated_without_another_rounding(tmp_path):
    folder = _model(tmp_path / "m")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    name = "model.embed_tokens.weight"
    exact = tensors[name].double() @ hadamard(32)
    rotated = RotatedSource(ModelSource(folder))
    assert torch.equal(rotated.tensors([name])[name], exact.float())
    assert rotated.tensors([name], torch.bfloat16)[name].dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_the_rotated_model_is_untied_and_keeps_the_digest(tmp_path, tied):
    original = ModelSource(save_family(tmp_path / "m", "gemma", tied=tied))
    rotated = RotatedSource(original)
    parameters = rotated.model_from(rotated.tensors(rotated.weight_files)).parameters()
    assert rotated.num_parameters == sum(parameter.numel() for parameter in parameters)
    assert rotated.num_parameters - original.num_parameters == (original.vocab_size * 32 if tied else 0)
    assert rotated.config.tie_word_embeddings is False
    assert rotated.raw_config()["tie_word_embeddings"] is False
    assert original.config.tie_word_embeddings is tied
    assert rotated.digest == original.digest
    assert rotated.outside_names() == ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")


def test_another_attention_keeps_the_rotation(tmp_path):
    rotated = RotatedSource(ModelSource(_model(tmp_path / "m")), random=True, seed=5)
    assert rotated.with_attention(None) is rotated
    eager = rotated.with_attention("eager")
    assert eager.block_skeleton().self_attn.config._attn_implementation == "eager"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(eager.tensors([name])[name], rotated.tensors([name])[name])
    other = RotatedSource(ModelSource(tmp_path / "m"), random=True, seed=6)
    assert not torch.equal(other.tensors([name])[name], rotated.tensors([name])[name])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_calibration_of_it_is_a_plain_untied_model(tmp_path, family):
    original = ModelSource(_model(tmp_path / "m", family, tied=True))
    settings = {**TEXT, "wbits": 8, "groupsize": -1, "attn_implementation": "eager"}
    algorithm = Gptq(GptqConfig.model_validate(settings), exports=["dense"])
    calibrated, converted = run(algorithm, RotatedSource(original), tmp_path / "out")
    assert json.loads((calibrated.directory / "config.json").read_text())["tie_word_embeddings"] is False
    expected = base_logits(original)
    client = AutoModelForCausalLM.from_pretrained(converted.directory, dtype=torch.float32)
    for model in (algorithm.load(calibrated), client):
        assert (logits(model) - expected).norm() < 0.03 * expected.norm()  # codes of 8 bits, an embedding in float16


def test_an_outlier_in_the_residual_stream_is_spread(tmp_path):
    folder = save_family(tmp_path / "m", "llama", hidden=128)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "embed_tokens" in name:
            tensors[name][:, 7] *= 100
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][7] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    original = ModelSource(folder)
    for source, low, high in ((original, 60, 129), (RotatedSource(original), 1, 4)):
        stream = _embedded(source)
        for index in range(2):
            stream.advance(source.load_block(index), index)
            rows = stream.batches[0].flatten(0, 1)
            assert low < ((rows**4).mean(1) / (rows**2).mean(1) ** 2).mean() < high


class _Biased(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))


class _Centred(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden):
        return nn.functional.layer_norm(hidden, hidden.shape[-1:], self.weight)


@pytest.mark.parametrize(
    ("path", "module", "reason"),
    [
        ("model.layers.0.input_layernorm", _Biased(32), "input_layernorm has bias, weight where"),
        ("model.layers.0.post_attention_layernorm", _Centred(32), r"post_attention_layernorm computes something else than x"),
        ("model.norm", _Centred(32), "model.norm computes something else"),
        ("model.layers.0.self_attn.extra", nn.Linear(32, 32), "self_attn.extra has parameters and is not in"),
        ("model.positions", nn.Embedding(4, 32), "model.positions has parameters and is not in"),
        ("model.layers.0.mlp.up_proj", nn.Linear(16, 64), "up_proj is 16 wide and the embeddings 32"),
    ],
)
def test_a_model_of_another_plan_is_refused_with_the_reason(tmp_path, monkeypatch, path, module, reason):
    original = ModelSource(save_family(tmp_path / "m", "llama"))
    skeleton = ModelSource.skeleton

    def changed(self):
        model = skeleton(self)
        model.set_submodule(path, module)
        return model

    monkeypatch.setattr(ModelSource, "skeleton", changed)
    with pytest.raises(ValueError, match=f"^rotation: m cannot be rotated: .*{reason}"):
        RotatedSource(original)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_norms": {"self_attn.q_proj": "input_layernorm"}}, "mlp.gate_proj is missing from the norms"),
        ({"residual_writers": ("self_attn.o_proj",)}, "what mlp.down_proj computes is not added"),
        ({"norm_offset": 1.0}, "input_layernorm computes something else"),
    ],
)
def test_a_row_of_another_plan_is_refused_with_the_reason(tmp_path, monkeypatch, changes, reason):
    original = ModelSource(save_family(tmp_path / "m", "llama"))
    row = replace(architecture_for("llama"), **changes)
    monkeypatch.setattr(source_module, "architecture_for", lambda model_type, config: row)
    with pytest.raises(ValueError, match=reason):
        RotatedSource(original)


def test_a_hidden_size_without_a_matrix_is_refused(tmp_path):
    original = ModelSource(save_family(tmp_path / "m", "llama", hidden=184))
    with pytest.raises(ValueError, match=r"rotation needs a Hadamard matrix of order 184, .* 180 and 192"):
        RotatedSource(original)


def _embedded(source):
    (stream,) = embed(source, [token_sequences(3, 12)], batch_size=3, device=torch.device("cpu"), offload=True)
    return stream
