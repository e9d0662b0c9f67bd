"""The V-step of PV-Tuning (arXiv 2405.14852, section 3.2): new codes for the few groups that are furthest from their targets.

A plain re-encoding after a small step of the weights changes nothing, because codes are coarse; a large step leaves the region
in which the gradient says anything. So the step may be large, but only a few groups of a matrix follow it at once.

Legend: N groups of d = og*ig weights, M codebooks of K codewords; all distances are those of the weights, scales included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.codebooks.nearest import lowest_score

_MAX_SCORES = 1 << 20
_MAX_SCORES_ON_DEVICE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class RecodeLimits:
    """How many groups may follow at once.

    ``max_change`` is the share of a matrix's groups that are examined, ``beam_size`` that of the search over several codebooks.
    ``trust_ratio`` bounds the norm of the accepted change over the norm of the matrix; None sets no bound, and one group may
    always change. ``forced`` takes the second best code where the best is the present one. With a ``temperature`` above zero,
    groups are drawn at random with weights (squared distance)^(0.5 / temperature), instead of the furthest being taken.
    """

    max_change: float = 0.01
    trust_ratio: float | None = None
    forced: bool = False
    temperature: float = 0.0
    beam_size: int = 1

    def count(self, num_groups: int) -> int:
        """Groups that are examined, of ``num_groups``."""
        return min(num_groups, math.ceil(self.max_change * num_groups))


def squared_distances(target: Tensor, unscaled: Tensor, scales: Tensor) -> Tensor:
    """|T - W_hat|^2 of every group.

    Args:
        target: T, [N, d].
        unscaled: sums of codewords, [N, d].
        scales: of every group, [N].

    Returns:
        [N].
    """
    return torch.sum((target - unscaled * scales[:, None]).square(), dim=1)


def selection_keys(distances: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    """Keys [N] whose largest belong to the groups to examine: the distances, or what draws at random by them.

    Args:
        distances: squared, [N].
        temperature: see :class:`RecodeLimits`.
        generator: of the draw.
    """
    if temperature == 0:
        return distances
    # Gumbel keys draw any number of groups without replacement; in the logarithm no weight can overflow.
    weights = distances.clamp_min(torch.finfo(distances.dtype).tiny).log() * (0.5 / temperature)
    noise = torch.rand(distances.shape, generator=generator).to(distances)
    return weights - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))


def propose(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebooks: Tensor,
    *,
    limits: RecodeLimits,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best codes that a beam search finds for some groups, starting from those they have.

    One codebook after another is searched in full, the others as they are in each hypothesis. The distance never rises.

    Args:
        target: T of the groups, [k, d].
        codes: the codes they have, [k, M].
        scales: their scales, [k]; a group whose scale is zero keeps its codes.
        codebooks: [M, K, d].
        limits: beam size, and whether the present codes are ruled out.
        order: permutation of the codebooks, [M].

    Returns:
        New codes [k, M] and the squared distances [k] between the old and the new weights.
    """
    usable = scales.abs() > 0
    wanted = target / torch.where(usable, scales, torch.ones_like(scales))[:, None]
    if codebooks.shape[0] == 1 and not limits.forced:
        _, nearest = lowest_score(wanted, codebooks[0], codebooks[0].square().sum(1))
        found = nearest[:, None]
    else:
        found = _beam_search(wanted, codes, codebooks, limits, order.tolist())
    found = torch.where(usable[:, None], found, codes)
    step = _sums(found, codebooks) - _sums(codes, codebooks)
    return found, torch.sum(step.square(), dim=1) * scales.square()


def accepted(moves: Tensor, *, trust_ratio: float | None, power: float) -> int:
    """How many of the proposals, in their order, may be taken: the longest prefix within the trust region, and one more.

    Args:
        moves: squared distances in order, [k].
        trust_ratio: bound on the norm of the change over that of the matrix; None for none.
        power: squared norm of the matrix.
    """
    if trust_ratio is None:
        return moves.numel()
    within = moves.double().cumsum(0) <= trust_ratio**2 * power
    return min(moves.numel(), int(within.sum()) + 1)


def _sums(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sums of codewords, [..., d], for codes [..., M]."""
    return sum(codebooks[m][codes[..., m]] for m in range(codebooks.shape[0]))  # type: ignore[return-value]


def _beam_search(wanted: Tensor, codes: Tensor, codebooks: Tensor, limits: RecodeLimits, order: list[int]) -> Tensor:
    limit = _MAX_SCORES if wanted.device.type == "cpu" else _MAX_SCORES_ON_DEVICE
    rows = max(1, limit // (codebooks.shape[1] * (limits.beam_size + 1)))
    parts = [
        _search(part, own, codebooks, limits, order) for part, own in zip(wanted.split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else codes


def _search(wanted: Tensor, codes: Tensor, codebooks: Tensor, limits: RecodeLimits, order: list[int]) -> Tensor:
    """Codes [k, M]; hypotheses are [k, b, M] with residuals [k, b, d]."""
    energies = codebooks.square().sum(2)
    beam = codes[:, None]
    residual = (wanted - _sums(codes, codebooks))[:, None]
    for place, m in enumerate(order):
        book = codebooks[m]
        without = residual + book[beam[..., m]]
        scores = energies[m] - 2 * without @ book.T + without.square().sum(2)[..., None]
        scores.masked_fill_(_repeated(beam, m)[..., None], torch.inf)
        is_last = place == len(order) - 1
        kept = min((2 if limits.forced else 1) if is_last else limits.beam_size, beam.shape[1] * book.shape[0])
        _, chosen = scores.flatten(1).topk(kept, dim=1, largest=False)
        parent, code = chosen // book.shape[0], chosen % book.shape[0]
        entry = torch.arange(parent.shape[0], device=parent.device)[:, None]
        beam = beam[entry, parent].clone()
        beam[..., m] = code
        residual = without[entry, parent] - book[code]
    if not limits.forced or beam.shape[1] == 1:
        return beam[:, 0]
    same = torch.all(beam[:, 0] == codes, dim=1)
    return torch.where(same[:, None], beam[:, 1], beam[:, 0])


def _repeated(beam: Tensor, m: int) -> Tensor:
    """Hypotheses [k, b] that equal an earlier one everywhere but in codebook m: they would have the same children."""
    same = beam[:, :, None] == beam[:, None, :]
    same[..., m] = True
    return torch.tril(same.all(3), diagonal=-1).any(2)
