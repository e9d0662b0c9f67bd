"""SpQR: small groups, two-level statistics and a few weights kept as they are (arXiv 2306.03078)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.blockwise.coded import Method
from algorithms.blockwise.pipeline import Pipeline, check_groups
from algorithms.formats.spqr import packed as spqr
from algorithms.modeling.source import ModelSource
from algorithms.numerics.sparse_quantized import SparseQuantized
from algorithms.quantization.spqr.calibration import fit, splits
from algorithms.quantization.spqr.config import SpqrConfig
from algorithms.quantization.spqr.conversion import FORMATS, check_exports, exporters, read_export
from algorithms.quantization.spqr.weight import stored_bits, tunable, tuned
from algorithms.workload import Workload

logger = logging.getLogger(__name__)


class Spqr(CompressionAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "SpQR"
    formats = FORMATS

    def __init__(self, config: SpqrConfig, exports: Sequence[str] = ()) -> None:
        # The packed form is the small one, and no stock client reads it: without EXPORT both are written.
        super().__init__(config, exports or ("dense", "spqr"))
        self._config = config
        method = Method[SparseQuantized](
            name="spqr",
            fit=lambda wanted, statistics, spread: fit(wanted, statistics, config, spread),
            pack=spqr.pack,
            dense_state=spqr.dense_state,
            stored_bits=stored_bits,
            tunable=tunable,
            tuned=tuned,
            join=SparseQuantized.joined if splits(config) else None,
            rows_together=2 * config.run,  # so that a part of a matrix is never just one run
        )
        self._pipeline = Pipeline(
            config=config, method=method, exports=self.exports, exporters=exporters(config), read_export=read_export
        )

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse groups that do not divide the model's matrices, and formats that cannot hold the weights.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if "calibration" in stages:
            check_groups(source, self._config.group_size, "llm.SpQR.groupsize")
        if "conversion" in stages:
            check_exports(self._config, self.exports, source)

    def stages(self) -> Sequence[StageSpec]:
        """Calibration and conversion."""
        return self._pipeline.specs()

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Of the calibration; see :meth:`Pipeline.workloads`."""
        return self._pipeline.workloads(source, tokens)

    def open(self, artifact: Artifact) -> nn.Module:
        """A calibration or an export as a float32 model."""
        return self._pipeline.open(artifact)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component, and the number of compressed weights. Says what SpQR's own count makes of them."""
        bits = self._pipeline.bits(artifact)
        counted = sum(bits.get(name, 0.0) for name in ("codes", "scales", "zeros", "second_level", "outliers"))
        logger.info(
            "SpQR's count: %.3f bits a weight; row pointers, permutation and headers come on top in the packed form",
            counted / bits["parameters"],
        )
        return bits
