"""A decoder of its own for every residual, trained within a budget of bits (ReALLM, arXiv 2405.13155)."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.residuals.coder import CodedResidual
from algorithms.numerics.residuals.neural.budget import DecoderSizes, plan
from algorithms.numerics.residuals.neural.codes import NeuralCodes
from algorithms.numerics.residuals.neural.layout import DecoderLayout
from algorithms.numerics.residuals.neural.patches import block_scales, spread
from algorithms.numerics.residuals.neural.quantizers import embedding_codes, row_scales, weight_codes
from algorithms.numerics.residuals.neural.target import HESSIAN, Target
from algorithms.numerics.residuals.neural.training import Display, Trained, Training, TrainingSettings


class NeuralCoder:
    """See :class:`algorithms.numerics.residuals.coder.ResidualCoder`.

    Args:
        sizes: of decoder and embeddings, and the bits that they may take.
        settings: of the training.
        loss: one of ``target.LOSSES``.
        display: see :class:`algorithms.numerics.residuals.neural.training.Training`.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        settings: TrainingSettings,
        *,
        loss: str = HESSIAN,
        display: Display | None = None,
    ) -> None:
        self._sizes, self._settings, self._loss, self._display = sizes, settings, loss, display
        self._last: tuple[NeuralCodes, Trained] | None = None

    def encode(
        self,
        residual: Tensor,
        hessian: Tensor | None,
        generator: torch.Generator,
        previous: CodedResidual | None = None,
    ) -> NeuralCodes:
        """Train a decoder for one residual; where ``previous`` is what this coder has made last, that training goes on.

        Raises:
            ValueError: the budget is too small for any decoder.
        """
        shape = (residual.shape[0], residual.shape[1])
        patches, layout = plan(shape, self._sizes)
        scales = block_scales(residual, self._sizes.block_size)
        spread_out = spread(scales.decode().view(shape[0], -1), shape)
        target = Target(residual, spread_out, patches, hessian, self._loss)
        start = self._last[1] if self._last is not None and previous is self._last[0] else None
        trained = Training(layout, target, self._settings, generator, start=start, display=self._display).run()
        tops = [top.to(residual.device) for top in layout.row_tops()]
        found = [row_scales(weight, top) for weight, top in zip(trained.decoder.weights, tops, strict=True)]
        coded = NeuralCodes(
            layout=layout,
            embedding=_codes(trained.embedding, layout),
            weights=[
                weight_codes(weight, scale, top).long()
                for weight, scale, top in zip(trained.decoder.weights, found, tops, strict=True)
            ],
            row_scales=found,
            biases=[bias.half().float() for bias in trained.decoder.biases],
            scales=scales,
            shape=shape,
        )
        self._last = (coded, trained)
        return coded


def _codes(embedding: Tensor, layout: DecoderLayout) -> Tensor:
    return embedding_codes(embedding, layout.value_tops(embedding.shape[0]).to(embedding.device)).long()
