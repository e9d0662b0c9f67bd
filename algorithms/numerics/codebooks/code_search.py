"""Search over the codes of additive codebooks under a Hessian: coordinate descent and beam search.

Both minimise <dW H, dW> with dW = W - W_hat over the codes alone. What makes them cheap is that E = dW H is kept up to date:
exchanging a codeword in input group j changes E by a rank-ig product with the rows H[j], and the loss of every candidate c at
that place is s^2 c H_jj c - 2 s <c, P> + const with P = E_j + s c_old H_jj.

Legend: O out_features, I in_features, og x ig tiles, no = O/og, ni = I/ig, M codebooks, K codewords, d = og*ig.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.numerics.codebooks.nearest import lowest_score

_MAX_SCORES = 1 << 20
_PANEL_COLUMNS = 128


def codeword_energies(codewords: Tensor, hessian_block: Tensor) -> Tensor:
    """C H_jj c, summed over the og rows of each codeword: codewords [K, og, ig], hessian_block [ig, ig], result [K]."""
    return torch.sum((codewords @ hessian_block) * codewords, dim=(1, 2))


def coordinate_descent(
    weight: AdditiveCodes, error: Tensor, hessian: Tensor, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One sweep over all groups and codebooks in random order, every code set to its best value given the others.

    Args:
        weight: codes to start from; scales must be positive.
        error: E = (W - W_hat) H, [O, I].
        hessian: H, [I, I], symmetric.
        generator: decides the order.

    Returns:
        New codes [no, ni, M] and the new E. The loss never rises.
    """
    ig = weight.group_shape[1]
    codes, error = weight.codes.clone(), error.clone()
    order = torch.randperm(codes.shape[1], generator=generator).tolist()
    groups_per_panel = max(1, _PANEL_COLUMNS // ig)
    for start in range(0, len(order), groups_per_panel):
        panel = order[start : start + groups_per_panel]
        columns = torch.cat([torch.arange(j * ig, (j + 1) * ig) for j in panel]).to(error.device)
        rows = hessian[columns]
        local = error[:, columns]
        change = _sweep_panel(weight, codes, panel, local, rows[:, columns], generator)
        # One wide product a panel instead of one thin product a group: E is read and written ni/panel times as rarely.
        error.addmm_(change, rows)
    return codes, error


def _sweep_panel(
    weight: AdditiveCodes, codes: Tensor, panel: list[int], local: Tensor, hessian: Tensor, generator: torch.Generator
) -> Tensor:
    """Descend on the groups of one panel; ``local`` [O, p*ig] is E there. Returns the change of dW, [O, p*ig]."""
    og, ig = weight.group_shape
    O = local.shape[0]
    change = torch.zeros_like(local)
    num_codebooks = codes.shape[2]
    for place, j in enumerate(panel):
        span = slice(place * ig, (place + 1) * ig)
        block = hessian[span, span]
        step = torch.zeros(O, ig, dtype=local.dtype, device=local.device)
        for m in torch.randperm(num_codebooks, generator=generator).tolist():
            codewords = weight.codebooks[m]
            old = codewords[codes[:, j, m]]
            target = (local[:, span] + step @ block).view(-1, og, ig) / weight.scales[:, None, None] + old @ block
            _, best = lowest_score(target.flatten(1), codewords.flatten(1), codeword_energies(codewords, block))
            step += ((old - codewords[best]) * weight.scales[:, None, None]).view(O, ig)
            codes[:, j, m] = best
        local.addmm_(step, hessian[span])
        change[:, span] = step
    return change


def beam_search(
    weight: AdditiveCodes, error: Tensor, matrix: Tensor, hessian: Tensor, *, beam_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One sweep that keeps the ``beam_size`` best code rows of every output group (AQLM, section 3.2).

    Output groups are independent and are searched in chunks of rows; all of them use the same order of places. Two beam
    entries that differ only at the place being set would have the same children: the worse one has none.

    Args:
        weight: codes to start from.
        error: E = (W - W_hat) H, [O, I].
        matrix: W, [O, I].
        hessian: H, [I, I].
        beam_size: number of code rows kept per output group.
        generator: decides the order.

    Returns:
        The best codes [no, ni, M] and their E. The loss never rises.
    """
    no, ni, M = weight.codes.shape
    og, _ = weight.group_shape
    places = [
        (j, m)
        for j in torch.randperm(ni, generator=generator).tolist()
        for m in torch.randperm(M, generator=generator).tolist()
    ]
    keys = torch.randint(1 << 62, (ni, M), generator=generator).to(weight.codes.device)
    difference = matrix - weight.dequantize()
    rows = max(1, _MAX_SCORES // (beam_size * max(weight.codebooks.shape[1], og * matrix.shape[1])))
    codes, errors = [], []
    for start in range(0, no, rows):
        part, tile_rows = slice(start, start + rows), slice(start * og, (start + rows) * og)
        beam = _Beam(weight.codes[part], error[tile_rows], difference[tile_rows], keys)
        for j, m in places:
            beam.extend(weight, weight.scales[part], hessian, place=(j, m), beam_size=beam_size)
        codes.append(beam.codes[:, 0])
        errors.append(beam.error[:, 0].reshape(-1, matrix.shape[1]))
    return torch.cat(codes), torch.cat(errors)


class _Beam:
    """Code rows [n, b, ni, M] of n output groups with their errors [n, b, og, I] and losses [n, b], best first."""

    def __init__(self, codes: Tensor, error: Tensor, difference: Tensor, keys: Tensor) -> None:
        n = codes.shape[0]
        self.codes = codes[:, None].clone()
        self.error = error.reshape(n, 1, -1, error.shape[1]).clone()
        self.losses = torch.sum(error * difference, dim=1).view(n, 1, -1).sum(2)
        self._keys = keys

    def extend(self, weight: AdditiveCodes, scales: Tensor, hessian: Tensor, *, place: tuple[int, int], beam_size: int) -> None:
        """Set the code at ``place`` = (input group, codebook) in every entry and keep the best ``beam_size``."""
        j, m = place
        codewords = weight.codebooks[m]
        K, _, ig = codewords.shape
        span = slice(j * ig, (j + 1) * ig)
        block = hessian[span, span]
        current = self.codes[:, :, j, m]
        old = codewords[current]
        factor = scales[:, None, None, None]
        target = self.error[..., span] / factor + old @ block
        energies = codeword_energies(codewords, block)
        scores = energies - 2 * target.flatten(2) @ codewords.flatten(1).T
        scores -= scores.gather(2, current[..., None])
        losses = self.losses[..., None] + scales[:, None, None].square() * scores
        losses.masked_fill_(self._repeated(j, m)[..., None], torch.inf)
        kept = min(beam_size, losses[0].numel())
        self.losses, chosen = losses.flatten(1).topk(kept, dim=1, largest=False)
        parent, code = chosen // K, chosen % K
        entry = torch.arange(parent.shape[0], device=parent.device)[:, None]
        self.codes = self.codes[entry, parent]
        self.codes[:, :, j, m] = code
        change = (old[entry, parent] - codewords[code]) * factor
        self.error = self.error[entry, parent] + change @ hessian[span]

    def _repeated(self, j: int, m: int) -> Tensor:
        """Entries [n, b] that equal an earlier entry everywhere but at the place (j, m)."""
        rest = (self.codes * self._keys).sum((2, 3)) - self.codes[:, :, j, m] * self._keys[j, m]
        same = rest[:, :, None] == rest[:, None, :]
        return torch.tril(same, diagonal=-1).any(2)
