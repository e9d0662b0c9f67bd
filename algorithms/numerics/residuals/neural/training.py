"""Training of a decoder and its embeddings on the frames of one matrix.

Legend: p the side of a patch, N frames, c channels of an embedding, S the product of the strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.residuals.neural.layout import DecoderLayout
from algorithms.numerics.residuals.neural.network import Convolutions, decode_frames, encode_frames, new_decoder, new_encoder
from algorithms.numerics.residuals.neural.quantizers import (
    embedding_codes,
    embedding_values,
    rounded_weight,
    straight_through,
)
from algorithms.numerics.residuals.neural.target import Target

_WARM_UP, _FIRST_RATE = 0.1, 0.1  # a share of all steps, and of the rate
_FREE_RATE = 3.0  # of embeddings once they are parameters, in rates of the decoder
_EVALUATIONS = 50  # at most, of all frames
_MOST_REVERTS = 4
_SHOWN = 10  # steps of a display
_SHORTER = 4  # training that goes on from an earlier one
_MOST_SQUASHED = 0.999

Display = Callable[[int], AbstractContextManager[Callable[[str], None]]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """``batch_size`` counts frames.

    In ``encoder_share`` of the epochs an encoder makes embeddings; then they are parameters.
    """

    epochs: int = 100
    lr: float = 1e-2
    batch_size: int = 4
    encoder_width: int = 16
    encoder_share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The best state that training has met, and its ``loss``; ``embedding`` [N, c, p/S, p/S] is not yet rounded."""

    decoder: Convolutions
    embedding: Tensor
    loss: float


class Training:
    """One training; :meth:`run` does all of it.

    Args:
        layout: sizes of decoder and embeddings.
        target: what frames should become.
        settings: how.
        generator: decides first weights and the order of batches.
        start: an earlier training of the same layout to go on from, for a quarter of the epochs.
        display: opens a display of so many steps, each of which has a note.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        target: Target,
        settings: TrainingSettings,
        generator: torch.Generator,
        *,
        start: Trained | None = None,
        display: Display | None = None,
    ) -> None:
        self._layout, self._target, self._settings, self._generator = layout, target, settings, generator
        device = target.pixels.device
        self._tops = layout.value_tops(target.pixels.shape[0]).to(device)
        self._row_tops = [tops.to(device) for tops in layout.row_tops()]
        self._display = display or (lambda total: nullcontext(lambda note: None))
        self._encoder: dict[str, Tensor] = {}
        self._free: Tensor | None = None
        if start is None:
            self._epochs, self._decoder = settings.epochs, new_decoder(layout, generator).to(device)
            encoder = new_encoder(layout, settings.encoder_width, generator)
            self._encoder = {name: value.to(device) for name, value in encoder.items()}
        else:
            self._epochs, self._decoder = -(-settings.epochs // _SHORTER), start.decoder.copied()
            self._free = _unsquashed(start.embedding)
        self._rate = settings.lr
        self._optimizer = self._new_optimizer()

    def run(self) -> Trained:
        """Train, and return the best state of all evaluated ones, the first included."""
        best, reverts = self._evaluated(), 0
        batches = self._target.batches(self._settings.batch_size)
        every, shown = -(-self._epochs // _EVALUATIONS), min(_SHOWN, self._epochs)
        with torch.enable_grad(), self._display(shown) as step:
            for epoch in range(self._epochs):
                if self._free is None and epoch >= self._settings.encoder_share * self._epochs:
                    self._set_free()
                order = torch.randperm(len(batches), generator=self._generator).tolist()
                for place, batch in enumerate(order):
                    self._step(batches[batch], (epoch + place / len(order)) / self._epochs)
                if (epoch + 1) % every == 0 or epoch + 1 == self._epochs:
                    state = self._evaluated()
                    if state.loss < best.loss:
                        best = state
                    elif not math.isfinite(state.loss):
                        reverts += 1
                        if reverts > _MOST_REVERTS:
                            break
                        self._revert(best)
                if (epoch + 1) * shown // self._epochs > epoch * shown // self._epochs:
                    step(f"relative error {math.sqrt(max(best.loss, 0.0)):.4f}")
        return best

    def _step(self, frames: Tensor, done: float) -> None:
        for group, factor in zip(self._optimizer.param_groups, (1.0, _FREE_RATE), strict=False):
            group["lr"] = factor * self._rate * schedule(done)
        decoder = stored_decoder(self._decoder, self._row_tops)
        loss = self._target.loss(self._decoded(decoder, frames), frames)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def _decoded(self, decoder: Convolutions, frames: Tensor) -> Tensor:
        return decode_frames(decoder, self._layout.strides, rounded_embedding(self._embedding(frames), self._tops[frames]))

    def _embedding(self, frames: Tensor) -> Tensor:
        if self._free is not None:
            return torch.tanh(self._free[frames])
        return encode_frames(self._encoder, self._layout.strides, self._target.pixels[frames])

    @torch.no_grad()
    def _evaluated(self) -> Trained:
        """The present state, with its loss over all frames as they would be stored."""
        decoder = stored_decoder(self._decoder, self._row_tops)
        batches = self._target.batches(self._settings.batch_size)
        loss = sum(self._target.loss(self._decoded(decoder, batch), batch).item() for batch in batches)
        embedding = torch.cat([self._embedding(batch) for batch in batches])
        return Trained(decoder=self._decoder.copied(), embedding=embedding, loss=loss)

    def _set_free(self) -> None:
        """Make parameters of the encoder's embeddings."""
        with torch.no_grad():
            embedding = torch.cat([self._embedding(batch) for batch in self._target.batches(self._settings.batch_size)])
        self._free, self._encoder = _unsquashed(embedding).requires_grad_(True), {}
        self._optimizer.add_param_group({"params": [self._free]})

    def _revert(self, best: Trained) -> None:
        """Back to the best state, from which embeddings go on as parameters, at half the rate."""
        self._decoder, self._rate = best.decoder.copied(), self._rate / 2
        self._free, self._encoder = _unsquashed(best.embedding), {}
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        moving = [*self._decoder.weights, *self._decoder.biases, *self._encoder.values()]
        groups = [{"params": [tensor.requires_grad_(True) for tensor in moving]}]
        if self._free is not None:
            groups.append({"params": [self._free.requires_grad_(True)]})
        return torch.optim.Adam(groups, lr=self._rate)


def schedule(done: float) -> float:
    """The rate, in shares of its peak, once a share of all steps is done: it rises from a tenth, then falls as a cosine."""
    if done < _WARM_UP:
        return _FIRST_RATE + (1 - _FIRST_RATE) * done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def rounded_embedding(values: Tensor, tops: Tensor) -> Tensor:
    """Values from -1 to 1 as they are stored, with their own gradient."""
    return straight_through(values, embedding_values(embedding_codes(values.detach(), tops), tops))


def stored_decoder(decoder: Convolutions, tops: list[Tensor]) -> Convolutions:
    """A decoder as it is stored, differentiable in what it is made of; ``tops`` as in ``DecoderLayout.row_tops``."""
    weights = [rounded_weight(weight, top) for weight, top in zip(decoder.weights, tops, strict=True)]
    return Convolutions(weights=weights, biases=[straight_through(bias, bias.half().float()) for bias in decoder.biases])


def _unsquashed(embedding: Tensor) -> Tensor:
    return torch.atanh(embedding.clamp(-_MOST_SQUASHED, _MOST_SQUASHED))
