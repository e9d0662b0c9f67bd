"""Every sequence is seen once an epoch, on any number of ranks."""

from collections import Counter

import pytest
import torch

from algorithms.finetuning.distillation.batches import Batches, in_micro_batches, stack
from algorithms.parallel.ranks import Ranks


def _ranks(size):
    """Ranks that share sequences out but never speak."""
    found = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        found.append(ranks)
    return found


def _sequences(lengths):
    return [torch.full((1, length), number + 1) for number, length in enumerate(lengths)]


def _counted(micros):
    return [number for micro in micros for number, mask in zip(micro.numbers, micro.mask, strict=True) if mask.any()]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch_size", "micro"), [(4, 1), (4, 2), (4, None), (100, 3)])
def test_an_epoch_holds_every_sequence_once(size, batch_size, micro):
    sequences = _sequences([5] * 11)
    seen, steps = Counter(), []
    for ranks in _ranks(size):
        batches = Batches(sequences, batch_size=batch_size, micro_batch_size=micro, seed=0, ranks=ranks)
        shapes = []
        for number in range(batches.steps_per_epoch):
            micros, tokens = batches.step(number)
            seen.update(_counted(micros))
            shapes.append((len(micros), tokens))
        steps.append(shapes)
    assert seen == Counter(range(11))
    assert all(shapes == steps[0] for shapes in steps)  # as many passes on every rank, and the same divisor
    assert sum(tokens for _, tokens in steps[0]) == 55


def test_steps_hold_the_same_sequences_on_any_number_of_ranks():
    sequences = _sequences([3] * 10)
    for number in range(6):
        together = []
        for size in (1, 2, 4):
            numbers = []
            for ranks in _ranks(size):
                batches = Batches(sequences, batch_size=4, micro_batch_size=1, seed=7, ranks=ranks)
                numbers += _counted(batches.step(number)[0])
            together.append(sorted(numbers))
        assert together[0] == together[1] == together[2]


def test_epochs_have_orders_of_their_own():
    batches = Batches(_sequences([3] * 32), batch_size=32, micro_batch_size=None, seed=0, ranks=Ranks())
    assert batches.step(0)[0][0].numbers != batches.step(1)[0][0].numbers


def test_shorter_sequences_are_padded_behind_and_pads_never_count():
    batch = stack(_sequences([2, 4]), [0, 1])
    assert batch.tokens.tolist() == [[1, 1, 0, 0], [2, 2, 2, 2]]
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_held_out_sequences_are_shared_out_evenly(size):
    sequences = _sequences([3, 4, 3])
    passes = [list(in_micro_batches(sequences, 1, ranks)) for ranks in _ranks(size)]
    assert len({len(micros) for micros in passes}) == 1
    assert sorted(number for micros in passes for number in _counted(micros)) == [0, 1, 2]
