"""What stays as it is, against the modules of transformers' own models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from algorithms.modeling.families.kept import kept_linears
from algorithms.modeling.source import ModelSource
from tests.support.families.cases import CASES, save_case
from tests.support.models import FAMILIES, save_family


@pytest.mark.parametrize("name", [*FAMILIES, *CASES])
def test_every_linear_is_compressed_or_kept(tmp_path, name):
    folder = save_case(tmp_path / "m", name) if name in CASES else save_family(tmp_path / "m", name, tied=True)
    source = ModelSource(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    compressed = {f"{source.architecture.blocks}.{index}.{path}" for index in range(2) for path in source.architecture.linears}
    kept = kept_linears(source)
    assert kept[0] == "lm_head"
    assert not compressed & set(kept)
    assert compressed | set(kept) == linears | ({"embed_out"} if "neox" in name else set())


def test_projections_around_the_blocks_are_kept(tmp_path):
    kept = kept_linears(ModelSource(save_case(tmp_path / "m", "opt-norms-behind")))
    assert set(kept) == {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
