"""ReALLM's linear under training, its learning rates, and the global tuning."""

import math

import pytest
import torch
from safetensors.torch import load_file

from algorithms.finetuning.distillation.batches import stack
from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.finetuning.distillation.teacher import TextTeacher, counted
from algorithms.modeling.source import ModelSource
from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.quantization.reallm.calibration import learning_rates
from algorithms.quantization.reallm.tuning_config import LowRankTuningConfig
from algorithms.quantization.reallm.weight import LowRankLinear
from tests.support.matrices import CODERS, problem
from tests.support.models import confident, save_family, token_sequences
from tests.unit.algorithms.quantization.plugin_runs import KilledError, calibrate, run_stage
from tests.unit.algorithms.quantization.reallm.reallm_runs import GLOBAL_TUNING, facts, reallm, weights


def _linear(kind="vq", rank=3):
    matrix, hessian = problem(22, 30)
    found = alternate(matrix, hessian, CODERS[kind](), torch.Generator().manual_seed(0), rank=rank, factor_bits=8, iterations=2)
    weight = LowRankWeight.of(found, "vq")
    return weight, LowRankLinear(weight, torch.randn(22))


@pytest.mark.parametrize("kind", ["vq", "nf2", "aqlm"])
def test_a_linear_starts_as_it_is_stored_and_is_stored_as_it_is(kind):
    weight, linear = _linear(kind)
    torch.testing.assert_close(linear.decode(), weight.dequantize())
    assert torch.equal(linear.stored().dequantize(), weight.dequantize())
    with torch.no_grad():
        for parameter in (linear.up, linear.down, linear.magnitude):
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    torch.testing.assert_close(linear.stored().dequantize(), linear.decode(), atol=0.05, rtol=0.02)


def test_gradients_are_those_of_the_formula():
    weight, linear = _linear()
    direction = torch.randn(22, 30)
    (linear.decode() * direction).sum().backward()
    tensors = {name: getattr(linear, name).detach().double().requires_grad_(True) for name in ("up", "down", "magnitude")}
    whole = weight.residual.dequantize().double() + tensors["up"] @ tensors["down"]
    rows = [tensors["magnitude"][row] * whole[row] / whole[row].norm() for row in range(22)]
    (torch.stack(rows) * direction).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(getattr(linear, name).grad.double(), tensor.grad, atol=1e-4, rtol=1e-4)


def test_steps_are_shares_of_each_tensors_size_or_one_rate():
    _, linear = _linear()
    block = torch.nn.Sequential(linear)

    def rates(**keys):
        return {id(parameter): rate for parameter, rate in learning_rates(block, LowRankTuningConfig(**keys))}

    found = rates(low_rank_step=0.5, magnitude_step=0.25, residual_step=None, other_step=0.125)
    sizes = {parameter: parameter.detach().square().mean().sqrt().item() for parameter in block.parameters()}
    expected = {linear.up: 0.5, linear.down: 0.5, linear.magnitude: 0.25, linear.bias: 0.125}
    assert found == {id(parameter): pytest.approx(step * sizes[parameter]) for parameter, step in expected.items()}
    assert set(rates(lr=1e-4).values()) == {1e-4}
    assert len(rates()) == 6
    assert len({id(parameter) for parameter in _linear(rank=0)[1].parameters() if parameter.numel()}) == 4


def test_the_text_as_a_teacher_gives_a_causal_loss():
    sequences = [sequence[:, :length] for sequence, length in zip(token_sequences(3, 9), (9, 5, 7), strict=True)]
    batch, teacher = stack(sequences, range(3)), TextTeacher()
    logits = torch.randn(3, 9, 400, generator=torch.Generator().manual_seed(0))
    total = kl_divergence(counted(logits, teacher.judged(batch)).requires_grad_(True), teacher.targets(batch))
    expected = sum(
        -logits[row, place].double().log_softmax(0)[sequence[0, place + 1]].item()
        for row, sequence in enumerate(sequences)
        for place in range(sequence.numel() - 1)
    )
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"loss": "causal_lm", "keep_best": False, "lr": 1e-3}])
def test_a_killed_global_tuning_goes_on_with_the_same_result(tmp_path, changes):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama")))
    algorithm = reallm(global_tuning={**GLOBAL_TUNING, "save_every_steps": 1, "update_embeddings": True, **changes})
    calibrated = calibrate(algorithm, source, tmp_path / "calibration")
    whole = run_stage(algorithm, source, tmp_path / "whole", "finetune_global", calibrated)
    import contextlib

    @contextlib.contextmanager
    def killed(description, total):
        steps = []

        def advance(note):
            steps.append(note)
            if len(steps) == 3:
                raise KilledError

        yield advance

    with pytest.raises(KilledError):
        run_stage(algorithm, source, tmp_path / "broken", "finetune_global", calibrated, killed)
    again = run_stage(algorithm, source, tmp_path / "broken", "finetune_global", calibrated)
    losses = facts(again)["global_tuning"]["losses"]
    assert losses == facts(whole)["global_tuning"]["losses"]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    for name in ("0.safetensors", "1.safetensors", "not_quantized_weights.safetensors"):
        expected, found = (load_file(made.directory / name) for made in (whole, again))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not list(again.directory.glob(".*"))
    if changes:
        before, after = (weights(made)["mlp.up_proj"] for made in (calibrated, again))
        assert torch.equal(before.residual.codes, after.residual.codes)
        assert not torch.equal(before.residual.book, after.residual.book)
        assert not torch.equal(before.low_rank.down, after.low_rank.down)
        # The text itself is learnt, not the original: both losses are cross-entropies, of 259 tokens.
        assert losses[0] > 3.0
