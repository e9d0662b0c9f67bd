"""Pruned calibrations of tiny models, and what they have to compute: the original with what is gone set to zero."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from algorithms.formats.checkpoint import Calibrated
from algorithms.modeling.transforms.narrowing import Kept
from tests.support.models import confident, save_family, save_pruned, token_sequences

TOKENS = torch.cat(token_sequences(2, 12))
COMPENSATION = ("self_attn.o_proj", "mlp.down_proj")
GROUPS, HEADS_A_GROUP, HEAD_DIM, NEURONS = 4, 2, 4, 64
# Two groups of two heads divide the hidden size of 32; the widest block of the second has three, and 6 does not divide it.
UNIFORM = (
    Kept(groups=(0, 2), neurons=tuple(range(7, 47))),
    Kept(groups=(1, 3), neurons=tuple(range(0, 40))),
    Kept(groups=(2, 3), neurons=tuple(range(20, 60))),
)
RAGGED = (
    Kept(groups=(0, 3), neurons=tuple(range(3, 60, 2))),
    Kept(groups=(0, 2, 3), neurons=tuple(range(5, 58))),
    Kept(groups=(1,), neurons=(2, 3, 63)),
)


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A pruned model on disk beside its original."""

    origin: Path
    calibrated: Calibrated
    kept: tuple[Kept, ...]

    @torch.no_grad()
    def masked(self) -> nn.Module:
        """The original in float16 values with zeros in place of what reads pruned heads and neurons, and the new biases."""
        model = AutoModelForCausalLM.from_pretrained(self.origin, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        for layer, kept, (_, tensors) in zip(model.model.layers, self.kept, self.calibrated.blocks(), strict=True):
            width = HEADS_A_GROUP * HEAD_DIM
            channels = {group * width + place for group in kept.groups for place in range(width)}
            gone = {
                "self_attn.o_proj": set(range(GROUPS * width)) - channels,
                "mlp.down_proj": set(range(NEURONS)) - set(kept.neurons),
            }
            for name, columns in gone.items():
                linear = layer.get_submodule(name)
                linear.weight[:, sorted(columns)] = 0
                if f"{name}.bias" in tensors:
                    linear.bias = nn.Parameter(tensors[f"{name}.bias"].float())
        return model.eval()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the masked original for TOKENS."""
        return self.masked()(TOKENS).logits


def pruned_model(
    folder: Path, family: str, *, kept: tuple[Kept, ...] = RAGGED, biased: tuple[str, ...] = (), **changes: object
) -> PrunedModel:
    """A tiny model of a family with four groups of two heads, pruned."""
    origin = save_family(folder / "origin", family, blocks=len(kept), heads=GROUPS * HEADS_A_GROUP, **changes)
    calibrated = save_pruned(folder / "calibrated", confident(origin), kept, biased)
    return PrunedModel(origin=origin, calibrated=Calibrated(calibrated), kept=kept)


def settings_of(folder: Path) -> dict[str, object]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())
