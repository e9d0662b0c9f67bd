"""An algorithm that compresses nothing: stages that count their blocks on disk, a model that is one table, exports as files.

A server, if a recipe says so, multiplies what it serves; the clients on this machine do not.

The model is a table of logits by token. "Compression" multiplies the table by a scale that depends on the calibration tokens,
so every setting, input and data set leaves its mark in the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageSpec, TokenRequest
from configs.errors import DataError
from configs.strict import AlgorithmParameters
from tests.support.ranks.shared_stage import share

VOCABULARY = 16


class FakeConfig(AlgorithmParameters):
    algorithm: ClassVar[str] = "FAKE"
    stage_names: ClassVar[tuple[str, ...]] = ("calibration", "finetune", "conversion")
    export_formats: ClassVar[tuple[str, ...]] = ("dense", "other")

    save_intermediate_results: bool = True
    only_figures: bool = False
    blocks: int = 3
    scale: float = 0.5
    num_samples: int = 4
    tunes: bool = False
    journal: Path  # one line for every block that is computed, in every run
    wait_at: int | None = None  # the block before which the stage waits for a kill
    fail_at: int | None = None
    hidden: bool = False  # preflight refuses the finetune stage
    shared: bool = False  # the finetune stage runs on all ranks
    trouble: str = ""  # "rank:what", of the shared stage
    texts: tuple[str, ...] = ()  # that the finetune stage looks at
    served: float = 1.0  # by which a server multiplies logits

    @property
    def evaluate_only(self) -> bool:
        return self.only_figures


class TableModel(nn.Module):
    """Logits [n, t, v]: the table's row of each token."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.float())
        self.served = 1.0

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.served * self.table[input_ids])


def base_table() -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))


@dataclass
class FakeSource:
    """What the runner asks of a ModelSource."""

    directory: Path
    name: str = "org/fake"
    digest: str = "model-1"
    vocab_size: int = VOCABULARY
    num_parameters: int = VOCABULARY * VOCABULARY + 8
    num_blocks: int = 2
    trust_remote_code: bool = False
    weight_files: dict[str, str] = field(default_factory=lambda: {"table": "model.safetensors"})
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(to_dict=dict))

    def tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(bos_token_id=1)

    def skeleton(self) -> nn.Module:
        return nn.Module()

    @classmethod
    def create(cls, directory: Path) -> FakeSource:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"table": base_table()}, str(directory / "model.safetensors"))
        (directory / "config.json").write_text("{}")
        return cls(directory=directory)


class FakeAlgorithm(CompressionAlgorithm):
    name = "FAKE"
    formats = ("dense", "other")

    def stages(self) -> Sequence[StageSpec]:
        config = self.config
        request = TokenRequest(num_samples=config.num_samples, sequence_length=8, seed=7, validation_samples=1)
        specs = [
            StageSpec(
                name="calibration",
                run=self._calibrate,
                directory="calibration",
                kind="fake-calibration",
                settings={"blocks": config.blocks, "scale": config.scale},
                tokens=request,
                reuse_on_new_data=True,
            ),
            StageSpec(
                name="finetune",
                run=self._tune,
                directory="finetune",
                kind="fake-finetune",
                tokens=request,
                distributed=config.shared,
                evaluates=config.texts,
            ),
            StageSpec(
                name="conversion",
                run=self._convert,
                directory="converted",
                kind="fake-converted",
                settings={"exports": list(self.exports)},
            ),
        ]
        return specs if config.tunes else [specs[0], specs[2]]

    def preflight(self, source: FakeSource, stages: Sequence[str]) -> None:
        if self.config.hidden and "finetune" in stages:
            raise DataError("finetune cannot run here")

    def open(self, artifact: Artifact) -> nn.Module:
        return TableModel(load_file(str(artifact.directory / "model.safetensors"))["table"])

    def as_served(self, model: nn.Module, artifact: Artifact, source: FakeSource, client: str | None = None) -> nn.Module:
        model.served = 1.0 if client else self.config.served
        return model

    def serving_notes(self, output: Path) -> Sequence[str]:
        return (f"A server multiplies by {self.config.served}.",) if self.config.served != 1 else ()

    def bits(self, artifact: Artifact) -> dict[str, float]:
        return {"codes": 2.0 * VOCABULARY**2, "scales": 0.5 * VOCABULARY**2, "parameters": VOCABULARY**2}

    def _calibrate(self, context: StageContext, given: Artifact) -> Artifact:
        with context.progress("calibration", self.config.blocks) as step:
            for block in range(self.config.blocks):
                self._block(context, block)
                step(f"block {block}")
        tokens = sum(int(sequence.sum()) for sequence in context.tokens)
        return self._write(context, given, self.config.scale * (1 + tokens / 1e4), "fake-calibration")

    def _block(self, context: StageContext, block: int) -> None:
        path = context.output_dir / f"{block}.json"
        if path.exists():
            return
        if self.config.wait_at == block:
            self._note("waiting")
            time.sleep(60)
        if self.config.fail_at == block:
            raise RuntimeError("the fake stage fails")
        self._note(f"calibration {block}")
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"block": block, "tokens": [sequence.tolist() for sequence in context.tokens]}))
        partial.replace(path)

    def _tune(self, context: StageContext, given: Artifact) -> Artifact:
        ranks, config = context.ranks, self.config
        shared = share(context, config.trouble, self._note) if config.shared else 0.0
        if context.evaluate is not None:
            figures = context.evaluate(self.load(given))
            assert ranks.sum_numbers(*figures.values()) == [ranks.size * figure for figure in figures.values()]
            context.metrics(figures)
        if not ranks.is_main:
            return Artifact(kind="fake-finetune", directory=context.output_dir, digest="")
        self._note(f"finetune {ranks.size}" if config.shared else "finetune")
        tokens = sum(int(sequence.sum()) for sequence in context.tokens)
        return self._write(context, given, 1 + (tokens + shared) / 1e4, "fake-finetune")

    def _convert(self, context: StageContext, given: Artifact) -> Artifact:
        self._note("conversion")
        artifact = self._write(context, given, 1.0, "fake-converted")
        (context.output_dir / "config.json").write_text(json.dumps({"format": self.exports[0]}))
        for name in self.exports[1:]:
            folder = context.output_dir / "exports" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").write_bytes((context.output_dir / "model.safetensors").read_bytes())
            (folder / "config.json").write_text(json.dumps({"format": name}))
        return artifact

    def _write(self, context: StageContext, given: Artifact, scale: float, kind: str) -> Artifact:
        table = load_file(str(given.directory / "model.safetensors"))["table"]
        save_file({"table": table * scale}, str(context.output_dir / "model.safetensors"))
        context.metrics({"scale": scale})
        return Artifact(kind=kind, directory=context.output_dir, digest="")

    def _note(self, line: str) -> None:
        with self.config.journal.open("a") as stream:
            stream.write(line + "\n")
