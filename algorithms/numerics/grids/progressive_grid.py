"""Progressive codes by the column sweep: group grids whose scales are whole multiples of their row's (QServe, section 4.1).

Legend: O out_features, I in_features, g columns a group; b bits, codes 0 .. 2^b - 1; s0 a row's scale, s1 and z a group's scale
and zero, whole numbers. A weight is s0 s1 (q - z), and s1 (q - z) has to be an integer of -128 .. 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.grids.progressive import ProgressiveCodes
from algorithms.numerics.grids.uniform_sweep import SweepSettings, row_places, sweep_codes
from algorithms.numerics.uniform import RangeSearch, UniformCodes, powers, stored_scales

# The largest number of a row at level 0: rounding at level 1 then cannot reach beyond 8 bits.
PROTECTIVE = {2: 96, 3: 111, 4: 119, 5: 123, 6: 125, 7: 126, 8: 127}
_LEAST, _MOST = -128, 127


@dataclass(frozen=True, kw_only=True)
class ProgressiveGrid:
    """Group grids on the rows' own; see :class:`algorithms.numerics.uniform.GroupGrid`.

    ``row_scales`` [O] are float16 values. No code of a grid stands for an integer beyond 8 bits, whatever the sweep makes of a
    column: zeros are chosen accordingly. The two whole scales beside the one that spans the group are always compared; with a
    ``search`` so are all that its factors reach.
    """

    row_scales: Tensor
    bits: int = 4
    search: RangeSearch | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scales s0 s1 and zeros [O] of a group, from its columns [g, O], by their error under ``weights`` [g]."""
        scaled = columns / self.row_scales
        low, high = scaled.amin(0).clamp(max=0), scaled.amax(0).clamp(min=0)
        full = ((high - low) / self.top).clamp(min=1e-6)
        degree, factors = (2.0, (1.0,)) if self.search is None else (self.search.degree, self.search.factors)
        if self.search is not None and not self.search.weighted:
            weights = torch.ones_like(weights)
        grids = _whole_grids(self.bits)
        # A range wider than the widest grid has that one to choose, a narrower one the narrowest.
        lowest = (full * min(factors)).floor().clamp(max=max(grids))
        highest = (full * max(factors)).ceil().clamp(min=1)
        best, zeros = torch.ones_like(full), torch.zeros_like(full)
        least = torch.full_like(full, torch.inf)
        for scale, bounds in grids.items():
            tried = torch.round(-low / full).clamp_(*bounds)
            codes = torch.round(scaled / scale + tried).clamp_(0, self.top)
            errors = weights @ powers(codes.sub_(tried).mul_(scale).sub_(scaled), degree)
            better = (errors < least) & (scale >= lowest) & (scale <= highest)
            least = torch.where(better, errors, least)
            best, zeros = torch.where(better, float(scale), best), torch.where(better, tried, zeros)
        return best * self.row_scales, zeros


def _whole_grids(bits: int) -> dict[int, tuple[int, int]]:
    """Every scale s1 with the least and the largest zero z for which s1 (q - z) is an 8-bit integer, whatever the code q."""
    top = (1 << bits) - 1
    bounds = {scale: (max(0, top - _MOST // scale), min(top, -_LEAST // scale)) for scale in range(1, _MOST - _LEAST + 1)}
    return {scale: (least, most) for scale, (least, most) in bounds.items() if least <= most}


def row_scales(matrix: Tensor, bits: int) -> Tensor:
    """Scales s0 [O] of W [O, I]: float16 values that bring each row's largest number to the protective one."""
    return stored_scales(matrix.abs().amax(1) / PROTECTIVE[bits])


def fit_progressive(
    wanted: Mapping[str, Tensor], hessian: Tensor | None, settings: SweepSettings
) -> dict[str, ProgressiveCodes]:
    """Progressive codes for weights [O, I] by name, the same I for all; of the settings' grid, bits and search count.

    Args:
        wanted: the weights.
        hessian: H [I, I] of their common input; None rounds every weight on its own.
        settings: groups and order; groups are runs of neighbours.
    """
    matrix = torch.cat(list(wanted.values()))
    scales = row_scales(matrix, settings.grid.bits)
    grid = ProgressiveGrid(row_scales=scales, bits=settings.grid.bits, search=settings.grid.search)
    codes = progressive(sweep_codes(matrix, hessian, settings, grid), scales)
    return {name: codes.rows(*place) for name, place in row_places(wanted).items()}


def progressive(codes: UniformCodes, row_scales: Tensor) -> ProgressiveCodes:
    """Uniform codes on progressive grids, with the two levels of their scales told apart."""
    assert codes.groups is None, "progressive groups are runs of neighbours"
    return ProgressiveCodes(
        codes=codes.codes,
        row_scales=row_scales,
        group_scales=torch.round(codes.scales / row_scales[:, None]).to(torch.uint8),
        zeros=codes.zeros.to(torch.uint8),
        bits=codes.bits,
    )
