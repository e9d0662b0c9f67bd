"""The one exhaustive search over codewords that k-means and the code search share."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_SCORES = 1 << 18
_MAX_SCORES_ON_DEVICE = 1 << 26
# A minimum without its index is reduced with vector instructions, one with its index is not: ten times slower. So the minima of
# blocks come first, and the index is looked for in the winning block alone.
_BLOCK = 64


def lowest_score(targets: Tensor, codewords: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Min over k of offsets[k] - 2 <targets[n], codewords[k]>, and where it is reached.

    Scores are computed for a few targets at a time, in one buffer that stays in cache: fresh buffers between small results
    that live on would fragment the heap by the size of every one of them.

    Args:
        targets: [N, d].
        codewords: [K, d].
        offsets: [K].

    Returns:
        Lowest scores [N] and indices [N].
    """
    limit = _MAX_SCORES if targets.device.type == "cpu" else _MAX_SCORES_ON_DEVICE
    count, rows = targets.shape[0], max(1, limit // codewords.shape[0])
    transposed = codewords.T.contiguous()
    scores = targets.new_empty(min(rows, count), codewords.shape[0])
    lowest = targets.new_empty(count)
    indices = torch.empty(count, dtype=torch.int64, device=targets.device)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        buffer = scores[: part.stop - start]
        torch.addmm(offsets, targets[part], transposed, alpha=-2, out=buffer)
        lowest[part], indices[part] = _minimum(buffer)
    return lowest, indices


def _minimum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum of every row of [n, K], and its column."""
    count, width = scores.shape
    if width % _BLOCK:
        return torch.min(scores, 1)
    blocks = scores.view(count, width // _BLOCK, _BLOCK)
    lowest, block = torch.min(torch.amin(blocks, 2), 1)
    inside = blocks[torch.arange(count, device=scores.device), block].argmin(1)
    return lowest, block * _BLOCK + inside
