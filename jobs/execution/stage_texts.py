"""The texts that a stage looks at while it works: figures for information, never on the text that results are scored on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from algorithms.base import StageSpec
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from configs.recipe import Recipe
from jobs.datasets import UNSCORED
from jobs.execution.collaborators import Collaborators
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

MOST_TOKENS = 65_536  # of each text: enough to see a trend, at every epoch


def stage_texts(
    spec: StageSpec, recipe: Recipe, source: ModelSource, workspace: Workspace, parts: Collaborators
) -> Mapping[str, Tensor]:
    """Name -> [n] int64 token ids of the texts that a stage names; those that cannot be read are left out, with a warning."""
    found = {}
    for name in spec.evaluates:
        if ":" in name:
            logger.warning("%s: %s is a task; only the perplexity of texts is measured. It is left out.", spec.name, name)
            continue
        try:
            tokens = parts.corpus_tokens(name, recipe, source, workspace, split=UNSCORED)[:MOST_TOKENS]
        except (DataError, OSError) as error:
            logger.warning("%s: %s cannot be read, so its figures are left out: %s", spec.name, name, error)
            continue
        if tokens.numel() < _window(spec):
            logger.warning(
                "%s: %s has %d tokens, less than one window of %d; its figures are left out.",
                spec.name,
                name,
                tokens.numel(),
                _window(spec),
            )
            continue
        found[name] = tokens
    return found


def evaluation_on(
    spec: StageSpec, texts: Mapping[str, Tensor], parts: Collaborators
) -> Callable[[nn.Module], Mapping[str, float]]:
    """What a stage is given to score its model with. On several ranks each has to call it, with the same windows."""

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        """The perplexity on every text, by name."""
        training = model.training
        model.eval()
        try:
            return {name: parts.perplexity(model, tokens, _window(spec)).value for name, tokens in texts.items()}
        finally:
            model.train(training)

    return evaluate


def _window(spec: StageSpec) -> int:
    assert spec.tokens is not None, "a stage that names texts has a sequence length"
    return spec.tokens.sequence_length
