import math
from contextlib import contextmanager

import pytest
import torch

from algorithms.numerics.residuals.neural.budget import DecoderSizes, plan
from algorithms.numerics.residuals.neural.network import Convolutions, decode_frames
from algorithms.numerics.residuals.neural.patches import block_scales, spread
from algorithms.numerics.residuals.neural.target import DIAGONAL, Target
from algorithms.numerics.residuals.neural.training import (
    Training,
    TrainingSettings,
    rounded_embedding,
    schedule,
    stored_decoder,
)
from tests.support.matrices import problem

SHAPE = (48, 40)


def _training(**settings):
    matrix, _ = problem(*SHAPE)
    patches, layout = plan(SHAPE, DecoderSizes(bits=4.0))
    scales = spread(block_scales(matrix, 128).decode().view(48, -1), SHAPE)
    target = Target(matrix, scales, patches, None, DIAGONAL)
    start, display = settings.pop("start", None), settings.pop("display", None)
    values = TrainingSettings(**{"epochs": 12, **settings})
    return layout, target, Training(layout, target, values, torch.Generator().manual_seed(0), start=start, display=display)


def _loss(layout, target, state):
    """Of all frames, from what storage would hold."""
    decoder = stored_decoder(state.decoder, layout.row_tops())
    embedding = rounded_embedding(state.embedding, layout.value_tops(target.patches.count))
    frames = decode_frames(decoder, layout.strides, embedding)
    return target.loss(frames, torch.arange(target.patches.count)).item()


def test_rates_rise_from_a_tenth_and_fall_as_a_cosine():
    assert [schedule(done) for done in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])
    assert schedule(0.325) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_what_is_returned_is_the_best_state_that_was_seen():
    layout, target, training = _training(lr=0.3)  # so much that the loss goes up and down
    seen, inner = [], training._evaluated

    def evaluated():
        seen.append(inner())
        return seen[-1]

    training._evaluated = evaluated
    best = training.run()
    losses = [state.loss for state in seen]
    assert len(losses) == 13
    assert losses != sorted(losses, reverse=True)
    assert best.loss == min(losses) < losses[0]
    assert _loss(layout, target, best) == pytest.approx(best.loss, rel=1e-5)


@pytest.mark.parametrize("epoch", [1, 9])  # with an encoder, and without
def test_a_training_that_breaks_goes_on_from_its_best_state(epoch):
    layout, target, training = _training()
    inner, losses = training._evaluated, []

    def evaluated():
        state = inner()
        losses.append(state.loss)
        if len(losses) == epoch + 1:
            for tensor in training._decoder.weights:
                tensor.data.fill_(torch.nan)
        return state

    training._evaluated = evaluated
    best = training.run()
    assert math.isnan(losses[epoch + 1])
    assert training._rate == TrainingSettings().lr / 2
    assert len(losses) == 13
    assert losses[-1] < losses[epoch]
    assert _loss(layout, target, best) == pytest.approx(best.loss, rel=1e-5)


def test_a_training_that_never_recovers_ends_with_its_best_state():
    _, _, training = _training()
    training._step = lambda frames, done: training._decoder.weights[0].data.fill_(torch.nan)
    first = training._evaluated()
    best = training.run()
    assert best.loss == first.loss < math.inf
    assert all(torch.isfinite(weight).all() for weight in best.decoder.weights)


def test_a_seed_gives_one_result_and_touches_no_global_one():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = _training(epochs=5)[2].run()
    torch.manual_seed(6)
    second = _training(epochs=5)[2].run()
    assert first.loss == second.loss
    assert torch.equal(first.embedding, second.embedding)
    assert all(torch.equal(one, two) for one, two in zip(first.decoder.weights, second.decoder.weights, strict=True))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_earlier_training_is_gone_on_from_for_a_quarter_of_its_epochs():
    notes = []

    @contextmanager
    def display(total):
        notes.append(total)
        yield notes.append

    first = _training(epochs=40, display=display)[2].run()
    assert notes[0] == 10
    assert len(notes) == 11
    assert notes[-1] == f"relative error {math.sqrt(first.loss):.4f}"
    notes.clear()
    layout, target, more = _training(epochs=40, start=first, display=display)
    second = more.run()
    assert len(notes) == 1 + 10
    assert second.loss < first.loss
    assert _loss(layout, target, first) == pytest.approx(first.loss, rel=1e-5)  # it is left as it was
    assert isinstance(second.decoder, Convolutions)


def test_gradients_are_those_of_what_is_stored():
    layout, target, training = _training(epochs=1)
    state = training.run()
    weights = [weight.clone().requires_grad_(True) for weight in state.decoder.weights]
    decoder = stored_decoder(Convolutions(weights=weights, biases=state.decoder.biases), layout.row_tops())
    embedding = rounded_embedding(state.embedding, layout.value_tops(target.patches.count))
    everything = torch.arange(target.patches.count)
    target.loss(decode_frames(decoder, layout.strides, embedding), everything).backward()
    # The loss as a function of the rounded weights, along one direction.
    rounded = [weight.detach() for weight in decoder.weights]
    directions = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) for weight in rounded]
    sides = []
    for sign in (1, -1):
        moved = [weight + sign * 1e-3 * direction for weight, direction in zip(rounded, directions, strict=True)]
        frames = decode_frames(Convolutions(weights=moved, biases=decoder.biases), layout.strides, embedding)
        sides.append(target.loss(frames, everything).item())
    slope = sum((weight.grad * direction).sum().item() for weight, direction in zip(weights, directions, strict=True))
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(slope, rel=0.02)
