"""Costs from shapes, and from how fast this machine multiplies matrices: within a factor of about three, not better."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from algorithms.base import CompressionAlgorithm, StageSpec
from algorithms.modeling.source import ModelSource
from algorithms.workload import ModelShapes, Workload
from configs.recipe import Recipe
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction
from jobs.execution.resources import resident_bytes
from jobs.planning import PlannedStage

_FLOAT, _HALF = 4, 2  # bytes of a stored value
_MEASURED_SECONDS = 0.3
_EFFICIENCY = 0.5  # of a stage, beside products of large matrices and nothing else
_CPU_SIZE, _CUDA_SIZE = 512, 4096
_BYTES_A_SECOND = 200e6  # read, converted and written again
_SECONDS_A_CLIENT = 3.0  # to start it
_WORKING_MEMORY = 150 << 20  # libraries and buffers that come with the first real work
# The certificate: 4 windows of 64 tokens and 16 more each, one at a time and all over again; then the same once more by us.
_CERTIFICATE_TOKENS = 4 * (64 + 16 * 72 + 80)
_STATES = 3  # copies of hidden states while all windows wait between two blocks
_LOGIT_OPERATIONS = 60  # of a logit, for perplexity and divergence of two models
_BYTES_A_TOKEN = 4  # of text
_UNKNOWN_TOKENS = 300_000  # of a text that nobody has read yet: about what wikitext2 has to test on


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``operations`` a second of one thread, or of the device; ``resident_bytes`` is what a process needs to do nothing."""

    operations: float
    threads: int
    resident_bytes: int
    on_device: bool = False

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        """From float32 products for a third of a second. Of a CPU its own time is counted, so that others do not disturb."""
        size, on_device = (_CUDA_SIZE, True) if device.type == "cuda" else (_CPU_SIZE, False)
        matrix = torch.ones(size, size, device=device)
        torch.mm(matrix, matrix)
        clock = time.monotonic if on_device else time.process_time
        if on_device:
            torch.cuda.synchronize(device)
        started, ending, count = clock(), time.monotonic() + _MEASURED_SECONDS, 0
        while time.monotonic() < ending or not count:
            torch.mm(matrix, matrix)
            count += 1
            if on_device:
                torch.cuda.synchronize(device)
        spent = max(clock() - started, 1e-6)
        return cls(
            operations=2.0 * size**3 * count / spent,
            threads=torch.get_num_threads(),
            resident_bytes=resident_bytes() + _WORKING_MEMORY,
            on_device=on_device,
        )

    def cost(self, load: Workload, *, seconds: float = 0.0, disk_bytes: int = 0) -> Prediction:
        """Of a workload, beside ``seconds`` that one thread is busy with other things."""
        busy = load.operations / (_EFFICIENCY * self.operations)
        wall = seconds + busy / (1 if self.on_device else self.threads)
        memory = round(load.memory_bytes)
        return Prediction(
            user_cpu_s=round(seconds + busy, 3),
            wall_s=round(wall, 3),
            peak_memory_bytes=self.resident_bytes + memory,  # what stays on the device is a part of it that nobody knows here
            disk_bytes=disk_bytes,
            peak_cuda_memory_bytes=memory if self.on_device else None,
            basis=Basis.SHAPES,
        )


@dataclass(frozen=True, kw_only=True)
class CoarseEstimate:
    """Guesses for the stages of one job."""

    recipe: Recipe
    algorithm: CompressionAlgorithm
    source: ModelSource
    machine: Machine

    def stages(self, stages: Sequence[PlannedStage], specs: Sequence[StageSpec]) -> Mapping[str, Prediction]:
        """Of the ``stages`` that run, among all ``specs`` of the recipe."""
        tokens = {spec.name: self._tokens(spec) for spec in specs if spec.tokens is not None}
        known = self.algorithm.workloads(self.source, tokens)
        shapes = ModelShapes.of(self.source)
        found = {}
        for planned in stages:
            spec = planned.spec
            walked = shapes.walk(tokens.get(spec.name, 0))
            formats = len(self.algorithm.exports) if spec is specs[-1] else 1
            disk = _HALF * self.source.num_parameters * formats
            found[spec.name] = self.machine.cost(known.get(spec.name, walked), seconds=disk / _BYTES_A_SECOND, disk_bytes=disk)
        return found

    def closing(self) -> Mapping[str, Prediction]:
        """Of the certificate and, where the recipe asks for figures, the evaluation."""
        shapes, formats = ModelShapes.of(self.source), len(self.algorithm.exports)
        whole = _FLOAT * shapes.parameters
        loading = whole / _BYTES_A_SECOND
        read = Workload(
            operations=formats * shapes.forward(_CERTIFICATE_TOKENS, head=True),
            memory_bytes=whole + 2 * _FLOAT * 4 * 80 * shapes.vocabulary,
        )
        found = {CERTIFICATE: self.machine.cost(read, seconds=formats * (_SECONDS_A_CLIENT + 2 * loading))}
        settings = self.recipe.evaluation
        if settings is not None and settings.corpora:
            count = sum(min(self._corpus_tokens(name), settings.max_tokens or 1 << 62) for name in settings.corpora)
            scored = Workload(
                operations=2 * shapes.forward(count, head=True) + _LOGIT_OPERATIONS * count * shapes.vocabulary,
                memory_bytes=_FLOAT
                * (
                    2 * (shapes.block_parameters + shapes.outside_parameters)  # of either model a block at a time
                    + 2 * _STATES * count * shapes.hidden
                    + 4 * settings.sequence_length * shapes.vocabulary
                ),
            )
            found[EVALUATION] = self.machine.cost(scored, seconds=2 * loading)
        return found

    def _tokens(self, spec: StageSpec) -> int:
        request = spec.tokens
        assert request is not None, "asked of stages with a text alone"
        if request.num_samples is not None:
            return request.num_samples * request.sequence_length
        return _text_tokens(self.recipe.data_path)

    def _corpus_tokens(self, name: str) -> int:
        given = self.recipe.corpora.get(name)
        return _text_tokens(given.get("test") if isinstance(given, Mapping) else given)


def _text_tokens(path: Path | None) -> int:
    """About how many tokens a local text has."""
    if path is None or not path.expanduser().exists():
        return _UNKNOWN_TOKENS
    place = path.expanduser()
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) // _BYTES_A_TOKEN
