"""SpQR's weight: uniform codes whose scales and zeros are themselves quantized, and a few outliers kept as they are.

SpQR, arXiv 2306.03078. Legend: O out_features, I in_features, g columns a group, G = I/g groups; a run is r neighbouring
output rows, R = ceil(O/r) runs; columns stand in the order of the sweep.

    dense[o, i] = scales[o, i // g] * (codes[o, i] - zeros[o, i // g]),   outliers stand in its place where there are any
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Scales or zeros of all groups, [O, G]: plain ``values`` in float32, or two-level codes.

    Two-level: codes [O, G] uint8 of ``bits`` bits, and for each run of ``run`` rows and each group a float16-representable
    ``run_scales`` and ``run_zeros`` [R, G] in float32: value = run_scale * (code - run_zero).
    """

    values: Tensor | None = None
    codes: Tensor | None = None
    run_scales: Tensor | None = None
    run_zeros: Tensor | None = None
    bits: int = 16
    run: int = 1

    def decode(self) -> Tensor:
        """The statistics [O, G] in float32."""
        if self.codes is None:
            assert self.values is not None
            return self.values
        rows = self.codes.shape[0]
        scales, zeros = (self._by_row(runs, rows) for runs in (self.run_scales, self.run_zeros))
        return scales * (self.codes.float() - zeros)

    @classmethod
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """Those of the rows of all parts, one part after another.

        Runs of every part but the last are whole. A part whose rows are all of one run has one for any number of rows; where
        runs have a length of their own, no part but the last has just one.
        """
        first = parts[0]
        if first.codes is None:
            return replace(first, values=_stacked([part.values for part in parts]))
        codes = _stacked([part.codes for part in parts])
        if first.run == first.codes.shape[0]:
            return replace(first, codes=codes, run=codes.shape[0])
        scales, zeros = (_stacked([getattr(part, name) for part in parts]) for name in ("run_scales", "run_zeros"))
        return replace(first, codes=codes, run_scales=scales, run_zeros=zeros)

    def _by_row(self, runs: Tensor | None, rows: int) -> Tensor:
        assert runs is not None
        return runs.repeat_interleave(self.run, 0)[:rows]


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Compressed sparse rows: ``offsets`` [O + 1] int32, ``columns`` [n] int32 (sweep order), ``values`` [n] float32.

    Values are representable in float16; columns rise within a row.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of every outlier, [n] int64."""
        counts = (self.offsets[1:] - self.offsets[:-1]).long()
        return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)

    @classmethod
    def of(cls, mask: Tensor, values: Tensor) -> Outliers:
        """From a mask [O, I] and values [O, I]."""
        offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        offsets[1:] = mask.sum(1).cumsum(0)
        return cls(offsets=offsets, columns=mask.nonzero()[:, 1].to(torch.int32), values=values[mask])

    @classmethod
    def joined(cls, parts: Sequence[Outliers]) -> Outliers:
        """Those of the rows of all parts, one part after another."""
        counts = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.cat([parts[0].offsets[:1], counts.cumsum(0, dtype=torch.int32)])
        columns, values = (_stacked([getattr(part, name) for part in parts]) for name in ("columns", "values"))
        return cls(offsets=offsets, columns=columns, values=values)


@dataclass(frozen=True, kw_only=True)
class SparseQuantized:
    """One matrix: codes [O, I] uint8 in sweep order, statistics of its groups, outliers, and ``order`` [I].

    ``order[p]`` int32 is the model's column at place p of the sweep; None where they are the same.
    """

    codes: Tensor
    scales: Statistics
    zeros: Statistics
    outliers: Outliers
    order: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        scales = self.scales.codes if self.scales.codes is not None else self.scales.values
        assert scales is not None
        return self.codes.shape[1] // scales.shape[1]

    @classmethod
    def joined(cls, parts: Sequence[SparseQuantized]) -> SparseQuantized:
        """The matrix of the rows of all parts, one part after another; see :meth:`Statistics.joined`."""
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=Statistics.joined([part.scales for part in parts]),
            zeros=Statistics.joined([part.zeros for part in parts]),
            outliers=Outliers.joined([part.outliers for part in parts]),
        )

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in float32, columns in model order."""
        O, I = self.codes.shape
        tiles = self.codes.view(O, -1, self.group_size).float() - self.zeros.decode()[:, :, None]
        dense = (tiles * self.scales.decode()[:, :, None]).view(O, I)
        dense[self.outliers.rows, self.outliers.columns.long()] = self.outliers.values
        if self.order is None:
            return dense
        matrix = torch.empty_like(dense)
        matrix[:, self.order.long()] = dense
        return matrix


def _stacked(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
