"""Orders in which a sweep can visit the columns of a matrix. Legend: O out_features, I in_features."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("identity", "act_order", "spearman")


def column_order(kind: str, matrix: Tensor, hessian: Tensor) -> Tensor | None:
    """Model columns in sweep order, [I] int64; None for the identity.

    Args:
        kind: ``identity``; ``act_order``, columns with the largest diagonal of H first; ``spearman``, each column followed by
            the one of the rest whose ranks over the rows are most alike.
        matrix: W [O, I].
        hessian: H [I, I].
    """
    if kind == "identity":
        return None
    if kind == "act_order":
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return _spearman(matrix)


def _spearman(matrix: Tensor) -> Tensor:
    ranks = matrix.argsort(dim=0, stable=True).argsort(dim=0).float()
    ranks = torch.nn.functional.normalize(ranks - ranks.mean(0), dim=0)
    likeness = ranks.T @ ranks
    order = torch.empty(matrix.shape[1], dtype=torch.int64, device=matrix.device)
    current = 0
    for place in range(matrix.shape[1]):
        order[place] = current
        likeness[:, current] = -torch.inf  # it is taken
        current = likeness[current].argmax()
    return order
