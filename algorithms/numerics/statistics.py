"""Statistics of the inputs of linear layers, gathered token by token."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Streaming mean of x x^T over tokens: the project's one Hessian convention, H = E[x x^T], without a factor 2.

    Products are taken in float32 and summed in float64, so the result does not depend on how the tokens were batched beyond
    float32 rounding of one batch. Tokens with a non-finite value are left out and counted.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.num_tokens = 0
        self.num_skipped = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens [..., in_features]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        finite = torch.isfinite(rows.sum(1))
        if not finite.all():
            self.num_skipped += int((~finite).sum())
            rows = rows[finite]
        self._sum += rows.T @ rows
        self.num_tokens += rows.shape[0]

    def merge(self, other: InputStatistics) -> None:
        """Add what another process or batch has gathered."""
        self._sum += other._sum
        self.num_tokens += other.num_tokens
        self.num_skipped += other.num_skipped

    def hessian(self) -> Tensor:
        """H [in_features, in_features] in float32.

        Raises:
            ValueError: no finite token was seen.
        """
        if self.num_tokens == 0:
            raise ValueError(
                f"no finite activations reached this layer ({self.num_skipped} tokens were infinite or NaN): "
                "the model overflows on the calibration text; try dtype: float32."
            )
        return (self._sum / self.num_tokens).float()
