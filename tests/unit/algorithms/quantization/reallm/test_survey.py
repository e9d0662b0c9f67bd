import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.quantization.reallm.survey.curves import Curves, Probe, measure
from algorithms.quantization.reallm.survey.stage import effect
from tests.support.matrices import problem
from tests.support.models import confident, save_family, token_sequences
from tests.unit.algorithms.quantization.plugin_runs import (
    KilledError,
    base_logits,
    calibrate,
    killed_at,
    logits,
    run,
)
from tests.unit.algorithms.quantization.reallm.reallm_runs import reallm, weights


@pytest.mark.parametrize(("residual", "target"), [("vq", 5.5), ("nf", 5.0), ("nf", 6.5)])
def test_a_budget_of_bits_is_met(tmp_path, residual, target):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64, blocks=2))
    algorithm = reallm(target_bits=target, residual=residual)
    _, calibrated, _ = run(algorithm, source, tmp_path / "out")
    bits = dict(algorithm.bits(calibrated))
    average = sum(value for name, value in bits.items() if name != "parameters") / bits["parameters"]
    assert target - 0.01 <= average <= target
    shapes = {(weight.low_rank.rank, *weight.residual.codes.shape) for weight in weights(calibrated).values()}
    assert len(shapes) > 2


def test_a_budget_out_of_reach_is_refused(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=r"llm\.ReALLM\.target_bits: 0\.5 is out of reach; this model takes \d"):
        calibrate(reallm(target_bits=0.5, residual="nf"), source, tmp_path / "out")
    survey = calibrate(reallm(target_bits=7.0, residual="nf"), source, tmp_path / "kept")
    with pytest.raises(ValueError, match="holds no model"):
        reallm(target_bits=7.0).load(survey)


def test_bits_that_are_shared_out_leave_a_better_model_than_equal_ones(tmp_path):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama", hidden=64)))
    uniform = reallm(residual="nf", num_bits=3, rank=6)
    plain = calibrate(uniform, source, tmp_path / "uniform")
    bits = dict(uniform.bits(plain))
    average = sum(value for name, value in bits.items() if name != "parameters") / bits["parameters"]
    sharing = reallm(residual="nf", target_bits=average)
    chosen = run(sharing, source, tmp_path / "chosen")[1]
    spent = dict(sharing.bits(chosen))
    assert sum(value for name, value in spent.items() if name != "parameters") <= average * spent["parameters"]
    plain_error, error = ((logits(uniform.load(made)) - base_logits(source)).square().mean() for made in (plain, chosen))
    assert error < 0.8 * plain_error


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_the_effect_of_a_linear_is_what_its_error_does_to_the_hidden_states(tmp_path, name):
    source = ModelSource(confident(save_family(tmp_path, "llama")))
    tokens = token_sequences(3, 10)
    (inputs,) = embed(source, [tokens], batch_size=2, device=torch.device("cpu"), offload=False)
    block = source.load_block(0)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    probe = Probe(matrix=block.get_submodule(name).weight * 0.9, error=0.01)
    found = effect(block, 0, name, probe, inputs, inputs.through(block, 0))
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())

    other, ratios = deepcopy(block), []
    other.get_submodule(name).weight.mul_(0.9)
    for sequence in tokens:
        (single,) = embed(source, [[sequence]], batch_size=1, device=torch.device("cpu"), offload=False)
        ((was,), (now,)) = (single.through(module, 0).batches for module in (block, other))
        ratios += [(float((b - a).norm()) / float(a.norm())) ** 2 for a, b in zip(was[0], now[0], strict=True)]
    assert found == pytest.approx(sum(ratios) / len(ratios) / 0.01, rel=1e-3)
    assert found > 0


def test_curves_are_the_same_once_they_have_been_written():
    matrix, hessian = problem(48, 32)
    found, probe = measure(matrix, hessian, reallm(target_bits=4.0)._config, ("here",))
    found = replace(found, effect=0.25)
    assert Curves.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.codes[4, 2][1] == pytest.approx(probe.error)
    difference, damped = matrix - probe.matrix, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    exact = torch.sum((difference @ damped) * difference) / torch.sum((matrix @ hessian) * matrix)
    assert probe.error == pytest.approx(exact.item(), rel=1e-4)
    whole, halved = found.options(8), replace(found, effect=0.125).options(8)
    assert all(halved[shape].error == pytest.approx(option.error / 2) for shape, option in whole.items())


@pytest.mark.parametrize("residual", ["vq", "nf"])
def test_a_killed_survey_goes_on_behind_the_blocks_that_it_has_measured(tmp_path, residual):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    algorithm = reallm(target_bits=7.0 if residual == "nf" else 5.5, residual=residual)
    whole = calibrate(algorithm, source, tmp_path / "whole")
    with pytest.raises(KilledError):
        calibrate(algorithm, source, tmp_path / "broken", killed_at(2))
    kept = [tmp_path / "broken" / f"curves-{index}.json" for index in range(3)]
    assert [path.exists() for path in kept] == [True, True, False]
    times = [path.stat().st_mtime_ns for path in kept[:2]]
    again = calibrate(algorithm, source, tmp_path / "broken")
    assert [path.stat().st_mtime_ns for path in kept[:2]] == times
    assert again.digest == whole.digest
    names = ("shapes.json", *(path.name for path in kept))
    assert all((again.directory / name).read_bytes() == (whole.directory / name).read_bytes() for name in names)
