from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms.formats import client, gptq
from algorithms.formats.client import NEW_TOKENS, NO_CLIENT, main, no_client, record
from algorithms.modeling.source import ModelSource
from tests.support.models import save_family, token_sequences
from tests.support.quantized_models import QuantizedModel, quantized_llama

TOKENS = torch.cat(token_sequences(2, 12))


def run(client_format: str, folder: Path, scratch: Path) -> int:
    save_file({"tokens": TOKENS}, scratch / "tokens.safetensors")
    return main([client_format, str(folder), str(scratch / "tokens.safetensors"), str(scratch / "out.safetensors")])


def test_dense_logits_and_their_greedy_continuation(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    assert run("dense", tmp_path / "m", tmp_path) == 0
    answer = load_file(tmp_path / "out.safetensors")
    model = source.model_from(source.tensors(source.weight_files))
    assert torch.equal(answer["logits"], model(TOKENS).logits)
    whole = torch.cat([TOKENS, answer["greedy"]], dim=1)
    assert answer["greedy"].shape == (2, NEW_TOKENS)
    assert torch.equal(model(whole).logits[:, TOKENS.shape[1] - 1 : -1].argmax(-1), answer["greedy"])


@pytest.mark.parametrize(
    ("client_format", "said"),
    [
        ("awq", "gptqmodel and vLLM"),
        ("gptq", "gptqmodel and vLLM"),
        ("qserve", "SGLang"),
        ("spqr-tiles", "on CUDA"),
        ("tensorrt-llm", "in TensorRT-LLM alone"),
    ],
)
def test_formats_without_a_client_here_say_what_reads_them(tmp_path, capsys, client_format, said):
    assert run(client_format, tmp_path, tmp_path) == NO_CLIENT
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("client_format", "package"), [("compressed-tensors", "compressed_tensors"), ("gguf", "gguf"), ("auto-round", "auto_round")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, client_format, package):
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None if name == package else object())
    assert no_client(client_format, tmp_path) == f"package {package} is not installed"
    assert no_client("dense", tmp_path) is None


def auto_round_error(model: QuantizedModel, out: Path, **settings: object) -> float:
    """How far the client's logits are from ours, in their deviation."""
    pytest.importorskip("auto_round")
    offset = gptq.auto_round_zero_offset(settings["symmetric"])
    packed = {}
    for name, codes in model.codes.items():
        packed |= gptq.pack(codes, name, zero_offset=offset)
    model.save(out, packed, gptq.auto_round_config(**settings))
    expected = model.logits(TOKENS)
    return ((record("auto-round", out, TOKENS)["logits"] - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (4, 32), (4, -1), (8, 64)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_auto_round_computes_our_logits(tmp_path, bits, group_size, symmetric, tied):
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    model = quantized_llama(tmp_path / "m", tied=tied, **grid)
    if not symmetric:
        next(iter(model.codes.values())).zeros[0] = 0
    assert auto_round_error(model, tmp_path / "out", kept_modules=["lm_head"], **grid) <= 1e-5


def test_auto_round_keeps_the_linears_that_stay(tmp_path):
    kept = "model.layers.1.mlp.down_proj"
    grid = {"bits": 4, "group_size": 32, "symmetric": True}
    model = quantized_llama(tmp_path / "m", **grid).keeping(kept)
    assert auto_round_error(model, tmp_path / "out", kept_modules=["lm_head", kept], **grid) <= 1e-5
