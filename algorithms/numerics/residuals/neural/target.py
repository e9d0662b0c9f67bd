"""What a decoder is trained towards, and how its errors count.

Legend: O out_features, I in_features, p the side of a patch, N frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.residuals.neural.patches import Patches, as_pixels

L2, DIAGONAL, HESSIAN = LOSSES = ("l2", "diagonal", "hessian")


class Target:
    """The frames of a matrix, and the loss of others in their place. Padding counts nothing.

    ``l2`` sums squared errors of pixels, as ReALLM does; ``diagonal`` those of the matrix, times the diagonal of H;
    ``hessian`` is <D H, D> of the matrix's errors D. Without H, the last two sum squared errors of the matrix.

    Args:
        matrix: [O, I].
        scales: of every weight, [O, I].
        patches: how it is cut.
        hessian: H [I, I] or None.
        loss: one of LOSSES.
    """

    def __init__(self, matrix: Tensor, scales: Tensor, patches: Patches, hessian: Tensor | None, loss: str) -> None:
        self.patches, self.pixels = patches, patches.cut(as_pixels(matrix, scales))
        sizes = torch.ones_like(scales) if loss == L2 else 2 * scales
        if hessian is not None and loss == DIAGONAL:
            sizes = sizes * hessian.diagonal().clamp(min=0).sqrt()
        self._sizes = patches.cut(sizes)
        self._hessian = hessian if loss == HESSIAN else None
        middle = torch.full_like(self.pixels, 0.5)
        self._power = 1.0
        self._power = self.loss(middle, torch.arange(patches.count, device=matrix.device)).item() or 1.0

    def loss(self, frames: Tensor, places: Tensor) -> Tensor:
        """The loss of frames [n, 1, p, p] at ``places`` [n], in shares of what all frames lose that are grey throughout.

        With ``hessian``, places are those of whole bands.
        """
        errors = (frames - self.pixels[places]) * self._sizes[places]
        if self._hessian is None:
            return errors.square().sum() / self._power
        rows = self.patches.rows(errors)
        return ((rows @ self._hessian) * rows).sum() / self._power

    def batches(self, size: int) -> list[Tensor]:
        """Places of all frames, about ``size`` a batch and with ``hessian`` whole bands, in their order."""
        places = torch.arange(self.patches.count, device=self.pixels.device)
        if self._hessian is not None:
            size = max(1, size // self.patches.a_band) * self.patches.a_band
        return list(places.split(size))
