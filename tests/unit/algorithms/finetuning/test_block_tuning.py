import pytest
import torch
from torch import nn

from algorithms.finetuning.block_tuning import TuningSettings, tune_block
from algorithms.finetuning.tunable import TunableLinear
from algorithms.modeling.activations import Activations
from algorithms.modeling.block_loop import BlockData


class _Arguments:
    def run(self, block, index, hidden):
        return block(hidden)


class _Scaled(TunableLinear):
    """W = scale * pattern, so that the best scale is known in closed form."""

    def __init__(self, pattern, scale, bias=None):
        super().__init__(bias)
        self.pattern = pattern
        self.scale = nn.Parameter(torch.tensor(scale))

    def decode(self):
        return self.scale * self.pattern


def _activations(*batches):
    cpu = torch.device("cpu")
    return Activations(batches=list(batches), arguments=_Arguments(), device=cpu, storage=cpu)


def _data(target, *, validation=True, lengths=(5, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, length, 6, generator=generator) for length in lengths]
    inputs = _activations(*batches)
    targets = _activations(*[target(batch).detach() for batch in batches])
    held = [torch.randn(2, 5, 6, generator=generator)] if validation else []
    return BlockData(
        inputs=inputs,
        targets=targets,
        validation_inputs=_activations(*held),
        validation_targets=_activations(*[target(batch).detach() for batch in held]),
    )


def _settings(**changes):
    return TuningSettings(**({"max_epochs": 40, "batch_size": 4, "micro_batch_size": 4} | changes))


def _tune(block, data, settings, rate=0.05):
    return tune_block(0, block, data, [(p, rate) for p in block.parameters()], settings, torch.Generator().manual_seed(0))


def test_it_finds_the_scale_and_bias_that_made_the_targets():
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    target = _Scaled(pattern, 1.5, torch.full((6,), 0.25))
    block = nn.Sequential(_Scaled(pattern, 1.0, torch.zeros(6)))
    report = _tune(block, _data(target), _settings())
    assert block[0].scale.item() == pytest.approx(1.5, abs=1e-2)
    torch.testing.assert_close(block[0].bias.detach(), torch.full((6,), 0.25), atol=1e-2, rtol=0)
    assert report.validation_losses[-1] < 1e-3 * report.validation_losses[0]
    assert len(report.validation_losses) == len(report.training_losses) + 1
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(recompute):
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    data = _data(_Scaled(pattern, 1.5), lengths=(5, 3))
    results = []
    for micro in (8, 1):
        block = nn.Sequential(_Scaled(pattern, 1.0))
        settings = _settings(max_epochs=3, batch_size=8, micro_batch_size=micro, recompute=recompute)
        _tune(block, data, settings)
        results.append(block[0].scale.item())
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_rate_that_ruins_the_block_leaves_it_as_it_was():
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    block = nn.Sequential(_Scaled(pattern, 1.5))
    report = _tune(block, _data(_Scaled(pattern, 1.5)), _settings(max_epochs=2), rate=10.0)
    assert block[0].scale.item() == 1.5
    assert report.best_epoch == 0


def test_a_loss_that_is_not_finite_restores_the_last_good_state():
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    data = _data(_Scaled(pattern, 1.5))
    data.inputs.batches[1][0, 0, 0] = torch.inf
    block = nn.Sequential(_Scaled(pattern, 1.0))
    report = _tune(block, data, _settings(max_epochs=3))
    assert report.reverted == "loss not finite in epoch 1"
    assert block[0].scale.item() == 1.0


def test_early_stop_counts_epochs_without_improvement():
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    block = nn.Sequential(_Scaled(pattern, 1.5))
    report = _tune(block, _data(_Scaled(pattern, 1.5)), _settings(max_epochs=30, early_stop=3), rate=1e-4)
    assert len(report.training_losses) == 3


def test_without_validation_the_last_epoch_stays():
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    block = nn.Sequential(_Scaled(pattern, 1.0))
    report = _tune(block, _data(_Scaled(pattern, 1.5), validation=False), _settings(max_epochs=2))
    assert report.best_epoch == 2
    assert report.validation_losses == []
    assert block[0].scale.item() != 1.0
