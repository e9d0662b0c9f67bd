"""ReALLM's exports: decoded weights, our packed layout, and a PEFT adapter over the residual."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from algorithms.blockwise.stages import Exporter, open_checkpoint
from algorithms.formats.checkpoint import Calibrated, write_checkpoint, write_dense
from algorithms.formats.reallm.packed import LAYOUT, quantization_config
from algorithms.formats.reallm.peft import write_peft
from algorithms.modeling.families.kept import kept_linears

FORMATS = ("dense", "reallm", "peft")
DENSE, PACKED, PEFT = FORMATS


def exporters(kind: str) -> Mapping[str, Exporter]:
    """The writer of every format; ``kind`` is that of the residuals."""
    return {
        DENSE: partial(write_dense, dense_state=LAYOUT.dense_state),
        PACKED: partial(_write_packed, kind=kind),
        PEFT: write_peft,
    }


def read_export(directory: Path) -> nn.Module:
    """A folder of decoded or packed weights as a float32 model, read without any client."""
    return open_checkpoint(directory, LAYOUT.dense_state)


def _write_packed(calibrated: Calibrated, directory: Path, kind: str) -> None:
    settings = quantization_config(kind=kind, kept_modules=kept_linears(calibrated.source))
    write_checkpoint(calibrated, directory, dict, settings)
