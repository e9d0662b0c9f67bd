"""What the runner works with, as one value that a test can replace piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from algorithms.base import CompressionAlgorithm, TokenRequest
from algorithms.modeling.evaluation import chunked
from algorithms.modeling.evaluation import perplexity as evaluation
from algorithms.modeling.on_demand import source_on_demand
from algorithms.modeling.source import ModelError, ModelSource
from algorithms.registry import algorithm_class
from configs.recipe import EvaluationConfig, Recipe
from jobs import datasets, models
from jobs.execution.soundness import Progress, check_weights
from jobs.logs import Terminal
from jobs.reporting.certificate import ClientCommand, client_command
from jobs.scoring.harness import Harness
from jobs.workspace import JobLock, Workspace


class Tokens(Protocol):
    """Calibration tokens: sequences [1, length] int64, and what was chosen."""

    @property
    def train(self) -> tuple[Tensor, ...]:
        """To calibrate on."""

    @property
    def validation(self) -> tuple[Tensor, ...]:
        """To measure on."""

    @property
    def record(self) -> Mapping[str, object]:
        """What was chosen, for the manifest."""


class CorpusTokens(Protocol):
    """The text that a corpus is scored on, or the named ``split`` of it, as one run of tokens [n] int64."""

    def __call__(self, name: str, recipe: Recipe, source: ModelSource, workspace: Workspace, *, split: str = ...) -> Tensor:
        """Read and tokenise it."""
        ...


def open_model(directory: Path, name: str, trust_remote_code: bool) -> ModelSource:
    """A model that another process of the same job has found."""
    return ModelSource(directory, name=name, trust_remote_code=trust_remote_code)


def load_dense(directory: Path, trust_remote_code: bool) -> nn.Module:
    """A Hugging Face folder as a float32 model in evaluation mode."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # its bar would cut through ours
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=trust_remote_code)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def open_source(source: ModelSource) -> nn.Module:
    """The uncompressed model; block by block where its blocks can be walked, else as transformers loads it."""
    plain = "quantization_config" not in source.raw_config()
    if plain and _has_blocks(source):
        return source_on_demand(source)
    return load_dense(source.directory, source.trust_remote_code)


def _has_blocks(source: ModelSource) -> bool:
    try:
        return bool(source.architecture.blocks)
    except ModelError:
        return False


def make_harness(settings: EvaluationConfig, cache_dir: Path) -> Harness:
    """lm-eval with a recipe's settings."""
    return Harness(settings=settings, cache_dir=cache_dir)


@dataclass(frozen=True, kw_only=True)
class Collaborators:
    """The functions that a job is put together from; the defaults are the real ones."""

    algorithm_class: Callable[[str], type[CompressionAlgorithm]] = algorithm_class
    lock: Callable[[Workspace], AbstractContextManager[object]] = JobLock
    resolve_model: Callable[[Recipe, Workspace], ModelSource] = models.resolve_model
    tokens_key: Callable[[Recipe, TokenRequest, ModelSource], str] = datasets.tokens_key
    load_tokens: Callable[[Recipe, TokenRequest, ModelSource, Workspace], Tokens] = datasets.load_tokens
    open_model: Callable[[Path, str, bool], ModelSource] = open_model
    corpus_tokens: CorpusTokens = datasets.corpus_tokens
    chunked_wikitext: Callable[[Recipe, ModelSource, Workspace], Tensor] = datasets.chunked_wikitext
    harness: Callable[[EvaluationConfig, Path], Harness] = make_harness
    open_source: Callable[[ModelSource], nn.Module] = open_source
    perplexity: Callable[[nn.Module, Tensor, int], evaluation.Perplexity] = evaluation.perplexity
    chunked_perplexity: Callable[[nn.Module, Tensor, int | None], chunked.ChunkedPerplexity] = chunked.chunked_perplexity
    check_weights: Callable[[ModelSource, Workspace, Progress], None] = check_weights
    compare: Callable[[nn.Module, nn.Module, Tensor, int], evaluation.Comparison] = evaluation.compare
    client_command: ClientCommand = client_command
    open_hub: Callable[[], HfApi] = HfApi
    terminal: Terminal = field(default_factory=Terminal)
