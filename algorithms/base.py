"""The contracts between the job runner and the algorithm plugins.

A plugin is a :class:`CompressionAlgorithm`: a frozen configuration and an ordered list of stages. A stage is a function
from a context and an input artifact to an output artifact; what it leaves on disk is all that the next stage sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from algorithms.modeling.on_demand import resident
from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE, Ranks
from algorithms.workload import Workload


class StageError(ValueError):
    """A stage cannot work with what the recipe gives it; the message says which key to change."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What one stage leaves for the next: a folder, what is in it, and the key of the stage that wrote it.

    ``kind`` is ``"model"`` for a Hugging Face folder and ``"<algorithm>-<stage>"`` for a plugin's own layout. ``digest``
    names the content: equal digests mean that a later stage would compute the same result from it.
    """

    kind: str
    directory: Path
    digest: str


@dataclass(frozen=True, kw_only=True)
class TokenRequest:
    """The calibration text a stage asks for: ``num_samples`` sequences of ``sequence_length`` tokens, None for all there are.

    ``validation_samples`` of them (chosen by ``seed``) are handed over as ``StageContext.validation_tokens``. With ``packed``
    false, every document becomes one sequence that is cut at ``sequence_length``, never joined with its neighbours.
    """

    num_samples: int | None
    sequence_length: int
    seed: int
    validation_samples: int = 0
    packed: bool = True


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among those that run the job together: rank 0 of 1 unless a launcher started several."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


class Progress(Protocol):
    """Opens a progress display of ``total`` steps; the value it yields is called once a step with a short note."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """Open the display."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """All that a stage may use; there is no other state.

    ``output_dir`` survives a kill: the stage resumes from whatever it finds there (the runner empties it first when the
    stage's key has changed) and it is renamed into place when the stage returns. ``scratch_dir`` is deleted after the stage.
    ``metrics`` appends one line to the job's metrics.jsonl; ``evaluate`` returns named figures of a running model on the texts
    that the stage names. Token sequences are int64 tensors of shape [1, length].

    A stage that is ``distributed`` runs on every rank of ``ranks`` at once, with the same context but for ``ranks`` and
    ``device``: all see the same tokens and folders, rank 0 alone writes files. Other stages run on rank 0, with ranks of one.
    """

    source: ModelSource
    tokens: Sequence[Tensor]
    validation_tokens: Sequence[Tensor]
    output_dir: Path
    scratch_dir: Path
    device: torch.device
    seed: int
    metrics: Callable[[Mapping[str, object]], None]
    progress: Progress
    ranks: Ranks = ALONE
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of an algorithm.

    ``settings`` holds every configuration value that shapes the result, and nothing else: it is what "resume by digest"
    compares. ``directory`` is the folder under the job's ``tmp/``. ``reuse_on_new_data`` marks a stage whose finished result
    is kept, with a warning, when only the data set of the recipe has changed. ``evaluates`` names texts that the stage wants
    ``StageContext.evaluate`` for, in windows of ``tokens.sequence_length``. ``version`` changes with the mathematics.
    """

    name: str
    run: Callable[[StageContext, Artifact], Artifact]
    directory: str
    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)
    tokens: TokenRequest | None = None
    distributed: bool = False
    evaluates: tuple[str, ...] = ()
    reuse_on_new_data: bool = False
    version: int = 1


class CompressionAlgorithm(ABC):
    """A plugin. The constructor only keeps its arguments; all work happens in the stages.

    ``config`` is an instance of the plugin's ``Config``. ``exports`` are the formats that the recipe asked for, a subset of
    ``formats``, whose first entry is the plugin's default. The stage that exports writes the first format into its
    ``output_dir`` and every further one into ``output_dir/exports/<format>``. ``loads`` is false where no artifact can be
    loaded on the machine that makes it: other programs make it, and run it. ``product`` is what has become of a model, and
    ``relation`` the hub's word for that.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    loads: ClassVar[bool] = True
    product: ClassVar[str] = "quantized"
    relation: ClassVar[str] = "quantized"

    def __init__(self, config: BaseModel, exports: Sequence[str] = ()) -> None:
        self.config = config
        self.exports = tuple(exports) or self.formats[:1]

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse what cannot work, before any stage starts.

        Args:
            source: the model of the job.
            stages: names of the stages that are about to run; those of the recipe that ``stages()`` lacks included.

        Raises:
            ValueError: what is wrong with the recipe, and which key to change.
            MissingEnvironmentError: this machine lacks something that a stage needs; says how to get it.
        """

    def commands(self, source: ModelSource, output: Path) -> Sequence[Sequence[str]]:
        """The programs that the stages start, as argument lists, in order; none for most.

        Args:
            source: the model of the job.
            output: the folder in place of the stages' own, so that a person can run the commands by hand.

        Raises:
            ValueError: what is wrong with the recipe, and which key to change.
        """
        return ()

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Rough workloads, for a plan that nothing has been measured for, of stages whose work is not a walk over the blocks.

        Args:
            source: the model of the job.
            tokens: how many each stage with a text is given.

        Returns:
            Workload by stage; one that is left out is taken for a walk over the blocks without tuning.
        """
        return {}

    @abstractmethod
    def stages(self) -> Sequence[StageSpec]:
        """The stages of this configuration, in order."""

    @abstractmethod
    def open(self, artifact: Artifact) -> nn.Module:
        """Any artifact of this algorithm as a float32 Hugging Face model that runs, with the values that would be exported.

        Where it can, it reads its blocks when they compute (``algorithms.modeling.on_demand``), so that the memory of one block
        is enough to score it.
        """

    def load(self, artifact: Artifact) -> nn.Module:
        """What :meth:`open` gives, with all its weights in memory."""
        return resident(self.open(artifact))

    def as_served(self, model: nn.Module, artifact: Artifact, source: ModelSource, client: str | None = None) -> nn.Module:
        """A loaded model as it computes where it is served: the same, unless a server rounds more than weights.

        Args:
            model: as :meth:`load` or :meth:`open` gives it; may be changed, and be handed over again.
            artifact: what it was loaded from.
            source: the model of the job.
            client: a format, whose client on this machine it is to compute like; without, as it is served.
        """
        return model

    def serving_notes(self, output: Path) -> Sequence[str]:
        """What whoever serves the result from its folder ``output`` has to know, for log and card, one sentence each."""
        return ()

    @abstractmethod
    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Total stored bits by component (codes, codebooks, ...), and ``parameters``, the number of compressed weights.

        ``added`` are bits of parameters outside the blocks that the original does not have, where there are any.
        """
