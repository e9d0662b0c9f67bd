"""FLAP's stages on tiny models, and what to look for in what they leave."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from algorithms.base import Artifact
from algorithms.modeling.source import ModelSource
from algorithms.pruning.flap.algorithm import FlapPruner
from algorithms.pruning.flap.config import FlapConfig
from tests.support.models import save_family, token_sequences

TEXT = {"nsamples": 8, "model_seqlen": 16}
TOKENS = torch.cat(token_sequences(8, 16))  # what the stages see


def pruner(exports: tuple[str, ...] = (), **keys: object) -> FlapPruner:
    """The plugin with keys of its block."""
    return FlapPruner(FlapConfig.model_validate({**TEXT, **keys}, by_alias=True), exports)


def kept(ranking: Artifact) -> list[tuple[list[int], list[int]]]:
    """Groups and neurons that stay of every block."""
    found = json.loads((ranking.directory / "kept.json").read_text())["blocks"]
    return [(block["groups"], block["neurons"]) for block in found]


def left(pruned: Artifact) -> int:
    """Weights of all linears that are left."""
    blocks = json.loads((pruned.directory / "calibration.json").read_text())["blocks"]
    return sum(block["linear_parameters"] for block in blocks)


def half_constant(folder: Path) -> ModelSource:
    """A Llama of float16 values half of whose neurons, and the second group of heads in every block, give constants."""
    saved = save_family(folder, "llama", attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[8:] = 0
            layer.mlp.gate_proj.weight[::2] = 0
            layer.mlp.up_proj.weight[::2] = 0
            for name in ("v_proj", "q_proj", "k_proj", "o_proj"):
                layer.self_attn.get_submodule(name).weight *= 10
            layer.mlp.up_proj.weight *= 10
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.save_pretrained(saved)
    return ModelSource(saved)


@torch.no_grad()
def mean_outputs(model: nn.Module, name: str) -> Tensor:
    """Of a linear over the tokens that the stages see, [O]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, given, output: seen.append(output))
    model(TOKENS)
    hook.remove()
    return seen[0].double().flatten(0, 1).mean(0)
