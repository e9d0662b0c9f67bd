"""Block tuning whose sequences lie on several ranks, beside that of one process."""

import math

import pytest
import torch
from torch import nn

from algorithms.finetuning import block_tuning
from algorithms.finetuning.block_tuning import TuningSettings, tune_block
from algorithms.finetuning.tunable import TunableLinear
from algorithms.modeling.activations import Activations
from algorithms.modeling.block_loop import BlockData
from algorithms.parallel.ranks import ALONE
from tests.support.rank_processes import run_on_ranks


class _Arguments:
    def run(self, block, index, hidden):
        return block(hidden)


class _Scaled(TunableLinear):
    """W = scales * pattern."""

    def __init__(self, factor):
        super().__init__(torch.full((6,), factor - 1))
        self.pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
        self.scales = nn.Parameter(torch.full((6, 1), factor))

    def decode(self):
        return self.scales * self.pattern


def _activations(sequences):
    batches = [sequence[None] for sequence in sequences]
    cpu = torch.device("cpu")
    return Activations(batches=batches, arguments=_Arguments(), device=cpu, storage=cpu)


def _data(ranks, *, count=9, held_out=3, spoiled=None):
    generator, target = torch.Generator().manual_seed(0), _Scaled(1.5)
    sequences = [torch.randn(3 + place % 4, 6, generator=generator) for place in range(count + held_out)]
    if spoiled is not None:
        sequences[spoiled][0] = torch.inf
    training, validation = ranks.mine(sequences[:count]), ranks.mine(sequences[count:])
    return BlockData(
        inputs=_activations(training),
        targets=_activations([target(sequence).detach() for sequence in training]),
        validation_inputs=_activations(validation),
        validation_targets=_activations([target(sequence).detach() for sequence in validation]),
        ranks=ranks,
    )


class _Recorder:
    """In the place of an optimizer: keeps the gradients of every step and changes nothing."""

    def __init__(self, tensors):
        self.tensors, self.param_groups, self.steps = tensors, [{"lr": 0.0, "peak": 1.0}], []

    def zero_grad(self):
        for tensor in self.tensors:
            tensor.grad = None

    def step(self):
        self.steps.append([tensor.grad.clone() for tensor in self.tensors])


def _gradients(ranks, count, batch_size):
    block, data = nn.Sequential(_Scaled(1.0)), _data(ranks, count=count)
    settings = TuningSettings(max_epochs=1, batch_size=batch_size, micro_batch_size=2)
    examples, recorder = block_tuning._Examples(0, block, data, settings), _Recorder(list(block.parameters()))
    steps, generator = examples.steps_per_epoch, torch.Generator().manual_seed(ranks.rank)
    loss = block_tuning._run_epoch(examples, recorder, recorder.tensors, first_step=0, steps=steps, generator=generator)
    return loss, recorder.steps


@pytest.mark.parametrize(("size", "count"), [(2, 9), (3, 2)])  # the third of three ranks has none of two sequences
def test_the_gradient_of_a_step_is_that_of_one_process(size, count):
    loss, (expected,) = _gradients(ALONE, count, 16)
    for found, (gradients,) in run_on_ranks(_gradients, size, count, 16):
        assert found == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-5)


def _steps(ranks, batch_size):
    """The lengths of this rank's sequences in each step, and the elements of the whole step."""
    data = _data(ranks)
    settings = TuningSettings(max_epochs=1, batch_size=batch_size, micro_batch_size=2)
    examples = block_tuning._Examples(0, nn.Sequential(_Scaled(1.0)), data, settings)
    steps = examples.shuffled(torch.Generator().manual_seed(ranks.rank))
    return [([data.inputs.batches[b].shape[1] for b, _ in places], elements) for places, elements in steps]


@pytest.mark.parametrize(("size", "batch_size", "expected"), [(2, 4, [4, 4, 1]), (2, 1, [1] * 9), (3, 2, [2, 2, 2, 2, 1])])
def test_every_sequence_is_in_one_step_of_an_epoch_and_steps_are_shared_evenly(size, batch_size, expected):
    found = run_on_ranks(_steps, size, batch_size)
    together = [[lengths for lengths, _ in step] for step in zip(*found, strict=True)]
    assert [sum(map(len, shares)) for shares in together] == expected
    assert all(max(map(len, shares)) - min(map(len, shares)) <= 1 for shares in together)
    assert sorted(length for shares in together for share in shares for length in share) == sorted(3 + n % 4 for n in range(9))
    for steps in found:
        assert [elements for _, elements in steps] == [6 * sum(map(sum, shares)) for shares in together]


def _tune(ranks, spoiled, options):
    block, data = nn.Sequential(_Scaled(1.0)), _data(ranks, spoiled=spoiled)
    settings = TuningSettings(**{"max_epochs": 30, "batch_size": 4, "micro_batch_size": 2} | options)
    rates = [(parameter, 0.05) for parameter in block.parameters()]
    report = tune_block(0, block, data, rates, settings, torch.Generator().manual_seed(ranks.rank))
    return report, [parameter.detach() for parameter in block.parameters()]


def test_ranks_take_the_same_steps_and_learn_what_one_process_learns():
    alone, _ = _tune(ALONE, None, {})
    (first, found), (second, others) = run_on_ranks(_tune, 2, None, {})
    assert first == second
    assert all(torch.equal(mine, other) for mine, other in zip(found, others, strict=True))
    assert first.validation_losses[0] == pytest.approx(alone.validation_losses[0], rel=1e-5)
    assert min(first.validation_losses) < 1e-3 * first.validation_losses[0]
    torch.testing.assert_close(found[1], torch.full((6, 1), 1.5), atol=2e-2, rtol=0)


def test_a_loss_that_is_not_finite_on_one_rank_puts_the_block_back_on_all():
    for report, (bias, scales) in run_on_ranks(_tune, 2, 3, {"max_epochs": 2}):
        assert report.reverted == "loss not finite in epoch 1"
        assert math.isfinite(report.validation_losses[0])
        assert scales.unique().tolist() == [1.0]
        assert bias.unique().tolist() == [0.0]
