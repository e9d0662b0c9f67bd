"""Which families' linears have the roles that QoQ knows."""

import pytest

from algorithms.modeling.source import ModelSource
from algorithms.quantization.lmquant.algorithm import family_refusal
from tests.support.families.cases import MIXTURES, save_case
from tests.support.models import FAMILIES, save_family


@pytest.mark.parametrize("family", FAMILIES)
def test_families_like_llama_have_them(tmp_path, family):
    assert family_refusal(ModelSource(save_family(tmp_path / "m", family)).architecture) is None


@pytest.mark.parametrize("family", ["granite", "smollm3", "gemma2", "gemma3_text", "seed_oss", "opt"])
def test_so_have_these(tmp_path, family):
    assert family_refusal(ModelSource(save_case(tmp_path / "m", family)).architecture) is None


@pytest.mark.parametrize("family", ["phi3", "cohere2", "falcon", "gpt_neox"])
def test_fused_and_mixed_projections_are_refused(tmp_path, family):
    said = family_refusal(ModelSource(save_case(tmp_path / "m", family)).architecture)
    assert "no three linears for queries, keys and values that alone share an input" in said


@pytest.mark.parametrize(
    ("family", "linear"), [("olmo2", "mlp.gate_proj"), *((name, "mlp.experts.0.gate_proj") for name in MIXTURES)]
)
def test_inputs_that_take_no_factors_are_refused(tmp_path, family, linear):
    said = family_refusal(ModelSource(save_case(tmp_path / "m", family)).architecture)
    assert "and neither makes the input of" in said
    assert linear in said
