import logging

import pytest
import torch

from algorithms.formats.reallm.packed import pack
from algorithms.modeling.source import ModelSource
from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.numerics.randomness import keyed_generator
from algorithms.quantization.reallm.config import ReallmConfig
from algorithms.quantization.reallm.shapes import Shape, coder
from algorithms.quantization.reallm.survey.sizes import stored_size
from tests.support.matrices import problem
from tests.support.models import save_family
from tests.unit.algorithms.quantization.plugin_runs import calibrate
from tests.unit.algorithms.quantization.reallm.reallm_runs import reallm


@pytest.mark.parametrize("matrix", [(37, 83), (130, 64), (4, 9)])
@pytest.mark.parametrize(
    ("residual", "bits", "bucket", "keys"),
    [
        ("vq", 4, 2, {}),
        ("vq", 9, 3, {"low_rank_bits": 16}),
        ("vq", 4, 2, {"permute": True}),
        ("vq", 6, 3, {"permute": True, "low_rank_bits": 5}),
        ("nf", 3, 1, {}),
        ("aqlm", 6, 4, {}),
        ("aqlm", 9, 4, {}),
    ],
)
def test_sizes_are_those_of_the_tensors_that_are_stored(matrix, residual, bits, bucket, keys):
    config, shape = ReallmConfig(residual=residual, **keys), Shape(rank=5, code_bits=bits, bucket=bucket)
    weight, hessian = problem(*matrix)
    options = {"rank": shape.rank, "factor_bits": config.low_rank_bits, "iterations": 1}
    found = alternate(weight, hessian, coder(shape, config, surveys=True), keyed_generator(0, "here"), **options)
    tensors = pack(LowRankWeight.of(found, residual), "here")
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sum(stored_size(matrix, shape, config).values()) == stored


@pytest.mark.parametrize("residual", ["vq", "nf", "aqlm"])
def test_a_budget_out_of_reach_is_refused_before_a_survey_as_after_it(tmp_path, residual):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = reallm(target_bits=0.5, residual=residual)
    with pytest.raises(ValueError, match=r"llm\.ReALLM\.target_bits: 0\.5 is out of reach; .* takes \d") as before:
        algorithm.preflight(source, ["survey"])
    with pytest.raises(ValueError, match="target_bits") as after:
        calibrate(algorithm, source, tmp_path / "out")
    assert str(before.value) == str(after.value)
    reallm(target_bits=5.0, residual=residual).preflight(source, ["survey"])


def test_shapes_that_are_too_much_for_small_matrices_are_told_of(tmp_path, caplog):
    source = ModelSource(save_family(tmp_path, "llama"))
    with caplog.at_level(logging.WARNING):
        reallm(rank=4).preflight(source, ["calibration"])
        assert caplog.text == ""
        reallm(rank=4, num_bits=3, bucket=4).preflight(source, ["calibration"])
    # 4096 words of four halves for each of seven matrices.
    average = 7 * 4096 * 64 / (4 * 32 * 32 - 2 * 16 * 32 + 3 * 64 * 32)
    assert f"codebooks {average:.1f}" in caplog.text
    assert "lower rank, num_bits or bucket" in caplog.text


def test_numbers_of_decoded_weights_are_finite_where_matrices_are_tiny():
    matrix, hessian = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)
    config, shape = ReallmConfig(), Shape(rank=64, code_bits=4, bucket=2)
    options = {"rank": 64, "factor_bits": 8, "iterations": 10}
    found = alternate(matrix, hessian, coder(shape, config), keyed_generator(0, "here"), **options)
    torch.testing.assert_close(LowRankWeight.of(found, "vq").dequantize(), matrix, atol=0.02, rtol=0.02)
