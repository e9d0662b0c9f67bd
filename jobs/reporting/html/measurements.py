"""What metrics.jsonl tells of a job: errors of its linears, and curves of what was tuned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """One linear of a block: squared error of its outputs over their square, bits a weight that it takes.

    ``gaussian_bits`` is what a Gaussian matrix would take for the same error under the same Hessian; None where that was not
    measured.
    """

    block: int
    name: str
    relative_error: float | None
    bits_per_weight: float | None
    gaussian_bits: float | None

    @property
    def place(self) -> str:
        """The name, with a star for the number of an expert: a mixture has too many of them to be told apart."""
        return re.sub(r"(?<=\bexperts\.)\d+(?=\.)", "*", self.name)

    @property
    def distance(self) -> float | None:
        """Bits beyond the Gaussian rate-distortion function."""
        if self.bits_per_weight is None or self.gaussian_bits is None:
            return None
        return self.bits_per_weight - self.gaussian_bits


@dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """Tokens that the router gave one expert of a block, and whether its statistics were taken from all tokens instead."""

    block: int
    number: int
    tokens: int
    saw_all: bool


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One block: its linears, the error of its output, and the losses of its tuning, training and held out, by epoch.

    ``experts`` are those of a mixture.
    """

    index: int
    linears: Sequence[LinearRecord]
    output_error: float | None
    training_losses: Sequence[float]
    validation_losses: Sequence[float]
    experts: Sequence[ExpertRecord] = ()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Figures of one stage by step: loss of each step, and what was measured between steps."""

    stage: str
    steps: Sequence[int]
    losses: Sequence[float]
    evaluations: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All of it. A stage that was killed and went on has written some lines twice: the last one counts."""

    blocks: Sequence[BlockRecord]
    curves: Sequence[Curve]


def read_measurements(path: Path, stages: Iterable[str]) -> Measurements:
    """From the lines of metrics.jsonl that belong to ``stages``; a damaged line is left out."""
    wanted = set(stages)
    lines = [line for line in _lines(path) if line.get("stage") in wanted]
    blocks = {line["index"]: line for line in lines if line.get("event") == "block" and isinstance(line.get("index"), int)}
    return Measurements(
        blocks=[_block(blocks[index]) for index in sorted(blocks)],
        curves=[curve for stage in dict.fromkeys(line["stage"] for line in lines) if (curve := _curve(stage, lines))],
    )


def _lines(path: Path) -> list[Mapping[str, Any]]:
    found = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                found.append(line)
    return found


def _block(line: Mapping[str, Any]) -> BlockRecord:
    tuning = line.get("tuning") or {}
    linears = line.get("linears")
    return BlockRecord(
        index=line["index"],
        linears=[_linear(line["index"], name, record) for name, record in linears.items()] if isinstance(linears, dict) else [],
        output_error=_number(line.get("output_error")),
        training_losses=tuning.get("training_losses", []),
        validation_losses=tuning.get("validation_losses", []),
        experts=_experts(line["index"], line.get("experts")),
    )


def _experts(block: int, record: object) -> list[ExpertRecord]:
    if not isinstance(record, dict):
        return []
    everywhere = set(record.get("calibrated_on_all_tokens", []))
    return [
        ExpertRecord(block=block, number=number, tokens=int(count), saw_all=number in everywhere)
        for number, count in enumerate(record.get("tokens", []))
    ]


def _linear(block: int, name: str, record: Mapping[str, Any]) -> LinearRecord:
    numbers = {key: _number(record.get(key)) for key in ("relative_error", "bits_per_weight", "gaussian_bits")}
    return LinearRecord(block=block, name=name, **numbers)


def _curve(stage: str, lines: Sequence[Mapping[str, Any]]) -> Curve | None:
    own = [line for line in lines if line["stage"] == stage]
    steps = {line["step"]: _number(line.get("loss")) for line in own if line.get("event") == "step"}
    judged = {line.get("step", 0): line for line in own if line.get("event") == "evaluation"}
    if not steps and not judged:
        return None
    known = [step for step in sorted(steps) if steps[step] is not None]
    return Curve(
        stage=stage,
        steps=known,
        losses=[steps[step] for step in known],
        evaluations=[judged[step] for step in sorted(judged)],
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
