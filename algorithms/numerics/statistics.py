"""Statistics of the inputs of linear layers, gathered token by token."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the mean diagonal of H that is added before it is inverted: directions that the calibration text hardly shows carry
# no evidence of how to correct a weight along them.
_RIDGE = 0.01


class InputStatistics:
    """Streaming mean of x x^T over tokens: the project's one Hessian convention, H = E[x x^T], without a factor 2.

    With ``paired``, each token comes with the input r that the same layer has in the original model, and E[r x^T] is gathered
    too. Products are taken in float32 and summed in float64, so the result does not depend on how the tokens were batched
    beyond float32 rounding of one batch. Tokens with a non-finite value are left out and counted.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", *, paired: bool = False) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._sum) if paired else None
        self._factor: Tensor | None = None  # of the damped sum, for all linears that share this input
        self.num_tokens = 0
        self.num_skipped = 0

    def update(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add tokens [..., in_features] and, where the statistics are paired, the original model's inputs of the same shape.

        Raises:
            ValueError: a reference without pairing, or pairing without a reference.
        """
        if (reference is None) != (self._cross is None):
            raise ValueError("paired statistics need a reference for every token, others take none")
        rows = _rows(inputs)
        originals = rows if reference is None else _rows(reference)
        finite = torch.isfinite(rows.sum(1) + originals.sum(1))
        if not finite.all():
            self.num_skipped += int((~finite).sum())
            rows, originals = rows[finite], originals[finite]
        self._sum += rows.T @ rows
        if self._cross is not None:
            self._cross += originals.T @ rows
        self.num_tokens += rows.shape[0]

    def merge(self, other: InputStatistics) -> None:
        """Add what another process or batch has gathered."""
        self._sum += other._sum
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross
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
                "the model overflows on the calibration text in float32; look at its weights."
            )
        return (self._sum / self.num_tokens).float()

    def corrected(self, matrix: Tensor) -> Tensor:
        """The weight that best gives the original outputs W r from the inputs x that the layer has now; W itself if unpaired.

        It minimises E|V x - W r|^2 plus a small ridge around W: V = W + W (E[r x^T] - H) (H + ridge)^-1. Since
        E|V' x - W r|^2 = <(V' - V) H, V' - V> + const without the ridge, compressing V under H makes up for errors made before.

        Args:
            matrix: W, [out_features, in_features].
        """
        if self._cross is None or self.num_tokens == 0:
            return matrix
        if self._factor is None:
            damped = self._sum.clone()
            damped.diagonal().add_(_RIDGE * self._sum.diagonal().mean())
            self._factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                self._factor = torch.eye(self._sum.shape[0], dtype=torch.float64, device=matrix.device)
                self._cross = self._sum.clone()  # no correction can be computed: none is made
        wide = matrix.double()
        drift = (wide @ self._cross).sub_(wide @ self._sum).T
        return matrix + torch.cholesky_solve(drift, self._factor).T.to(matrix.dtype)


def _rows(inputs: Tensor) -> Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1]).float()
