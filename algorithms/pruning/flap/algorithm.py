"""FLAP: heads and neurons that fluctuate least, or are least missed, are taken out (arXiv 2312.11983)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageSpec, TokenRequest
from algorithms.blockwise.pipeline import BITS
from algorithms.blockwise.stages import convert, facts, read_json
from algorithms.finetuning.recovery import targets
from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.pruned import ragged, stock
from algorithms.formats.pruned.padded import read_padded, write_padded
from algorithms.formats.pruned.ragged import MODELING, read_ragged, write_ragged
from algorithms.formats.pruned.sizes import StoredSize, sizes
from algorithms.formats.pruned.stock import expressible_biases
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import attention_output, narrowed_on_demand, neuron_output, obstacle, widths
from algorithms.pruning.flap import calibration, ranking, recovery
from algorithms.pruning.flap.config import FlapConfig
from algorithms.pruning.flap.recovery import recover_pruned
from algorithms.workload import ModelShapes, Workload

logger = logging.getLogger(__name__)

PADDED, RAGGED = "padded", "ragged"
CONVERTED = "flap-conversion"
_FACTS = "prune_config.json"


class FlapPruner(CompressionAlgorithm):
    """The plugin: stages ranking, pruning, recovery where it is asked for, and conversion."""

    name = "FlapPruner"
    formats = (PADDED, RAGGED)
    product = "pruned"
    relation = "finetune"  # the hub has no word for pruned

    def __init__(self, config: FlapConfig, exports: Sequence[str] = ()) -> None:
        super().__init__(config, exports)
        self._config = config

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse what the model's shapes contradict.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        config, key = self._config, "llm.FlapPruner"
        if config.start_pruning_layer_idx >= source.num_blocks:
            raise ValueError(
                f"{key}.start_pruning_layer_idx: {config.start_pruning_layer_idx} leaves nothing to prune; blocks are numbered "
                f"from 0, and the last of this model's is {source.num_blocks - 1}."
            )
        if source.architecture.is_inspected:
            raise ValueError(
                f"{key}: where {source.architecture.model_type} has heads and neurons is not known; FLAP needs a row of the "
                "architecture table (algorithms/modeling/families/table.py)."
            )
        self._refuse(source, key)
        size = widths(source.block_skeleton(), source.architecture)
        hidden = source.config.hidden_size
        for name, value in (("gqa_groups", size.heads_a_group), ("head_dim", size.head_dim), ("hidden_dim", hidden)):
            given = vars(config)[name]
            if given is not None and given != value:
                raise ValueError(f"{key}.{name}: the model has {value}, not {given}; leave the key out.")
        try:
            ranking.budget(source, config)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from error
        if config.recovers and config.recovering.method == "lora":
            said = key if config.target_modules is not None else f"{key}.recovery"
            targets(source.architecture.linears, config.recovering.target_modules, said)

    def _refuse(self, source: ModelSource, key: str) -> None:
        """Families that cannot be pruned, and formats that cannot hold a pruned model of this one."""
        reason = obstacle(source.architecture)
        if reason is not None:
            raise ValueError(f"{key}: FLAP prunes heads and gated neurons of plain models, and {reason}")
        refusals = {PADDED: stock.family_refusal(source.config), RAGGED: ragged.family_refusal(source.config)}
        said = [f"EXPORT: {name}: {refusals[name]}" for name in self.exports if refusals[name] is not None]
        if said:
            fitting = [name for name, refused in refusals.items() if refused is None]
            raise ValueError("\n".join([*said, *(f"EXPORT: [{name}] holds it." for name in fitting)]))

    def stages(self) -> Sequence[StageSpec]:
        """In their order."""
        config = self._config
        refits = config.compensation == calibration.LEAST_SQUARES
        request = TokenRequest(num_samples=config.num_samples, sequence_length=config.sequence_length, seed=config.seed)
        return (
            StageSpec(
                name="ranking",
                run=self._rank,
                directory="ranking",
                kind=ranking.KIND,
                settings=self._ranking_settings,
                tokens=request,
                distributed=True,
                reuse_on_new_data=True,
            ),
            StageSpec(
                name="pruning",
                run=self._prune,
                directory="pruning",
                kind=calibration.KIND,
                settings={**config.pruning_shaping, "biased": self._places_for_biases},
                tokens=request if refits else None,
                distributed=refits,
                reuse_on_new_data=True,
            ),
            *self._recovery_stage(),
            StageSpec(
                name="conversion",
                run=self._convert,
                directory="converted",
                kind=CONVERTED,
                settings={"exports": list(self.exports), "pad_neurons_to": config.pad_neurons_to},
            ),
        )

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Of the recovery; the other stages are walks."""
        if not self._config.recovers:
            return {}
        tuning, shapes = self._config.recovering, ModelShapes.of(source)
        sequences = tuning.micro_batch_size or tuning.batch_size
        count, length = tokens["recovery"], tuning.sequence_length
        return {"recovery": shapes.distillation(count, epochs=tuning.max_epochs, sequences=sequences, length=length)}

    def open(self, artifact: Artifact) -> nn.Module:
        """What a stage after the ranking has left, as a float32 model that reads its blocks when they compute.

        Raises:
            ValueError: a ranking, which holds no weights.
        """
        directory = artifact.directory
        if artifact.kind == ranking.KIND:
            raise ValueError(f"{directory} says what is to be pruned and holds no model; name the result of a later stage.")
        if artifact.kind == CONVERTED:
            return read_ragged(directory) if (directory / MODELING).is_file() else read_padded(directory)
        calibrated = Calibrated(directory)
        return narrowed_on_demand(calibrated.source, calibrated.outside(), calibrated.block)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Bits of the linears' weights that are left, and the number of weights that there were."""
        if artifact.kind == CONVERTED:
            return read_json(artifact.directory / BITS)
        return facts(artifact.directory)["bits"]

    def _recovery_stage(self) -> Sequence[StageSpec]:
        """The stage, where the recipe asks for it."""
        if not self._config.recovers:
            return ()
        config = self._config.recovering
        request = TokenRequest(
            num_samples=config.num_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            packed=not config.skip_grouping,
        )
        return (
            StageSpec(
                name="recovery",
                run=lambda context, artifact: recover_pruned(context, artifact, config),
                directory="recovery",
                kind=recovery.KIND,
                settings=config.shaping,
                tokens=request,
                distributed=True,
                evaluates=config.eval_datasets,
            ),
        )

    @property
    def _ranking_settings(self) -> Mapping[str, object]:
        """FLAP's own scores know nothing of biases."""
        settings = dict(self._config.ranking_shaping)
        return {**settings, "biased": self._places_for_biases} if self._config.metrics == ranking.OBS else settings

    @property
    def _places_for_biases(self) -> str:
        """Which biases may be added: any where the shipped code has a place for them, else those of a stock configuration."""
        if self._config.compensation == "none":
            return "none"
        return "stock" if PADDED in self.exports else "any"

    def _biased(self, source: ModelSource) -> frozenset[str]:
        """The linears behind attention and behind the neurons that may get a bias."""
        behind = frozenset({attention_output(source.architecture), neuron_output(source.architecture)})
        if self._places_for_biases == "none":
            return frozenset()
        return behind if self._places_for_biases == "any" else behind & expressible_biases(source.config)

    def _rank(self, context: StageContext, artifact: Artifact) -> Artifact:
        return ranking.rank(context, self._config, self._biased(context.source))

    def _prune(self, context: StageContext, artifact: Artifact) -> Artifact:
        return calibration.prune(context, artifact, self._config, self._biased(context.source))

    def _convert(self, context: StageContext, artifact: Artifact) -> Artifact:
        found = sizes(Calibrated(artifact.directory), multiple=self._config.pad_neurons_to)
        if PADDED in self.exports:
            _say_what_padding_undoes(found)
        atomic_write_json(context.output_dir / BITS, self.bits(artifact))
        atomic_write_json(context.output_dir / _FACTS, self._facts(artifact.directory, found))
        writers = {PADDED: partial(write_padded, multiple=self._config.pad_neurons_to), RAGGED: write_ragged}
        return convert(context, artifact, kind=CONVERTED, exports=self.exports, exporters=writers)

    def _facts(self, pruned: Path, found: Mapping[str, StoredSize]) -> Mapping[str, object]:
        """What was pruned, and what each form of it costs."""
        stored = {name: asdict(size) for name, size in found.items()}
        return {**facts(pruned)["ranking"], "compensation": self._config.compensation, "sizes": stored}


def _say_what_padding_undoes(found: Mapping[str, StoredSize]) -> None:
    """A warning, where blocks that kept their widths make all others as wide as they were."""
    original, ragged, padded = (found[name].parameters for name in ("original", RAGGED, PADDED))
    if ragged < original <= padded:
        logger.warning(
            "padded is no smaller than the original: each block has as many heads and neurons as the one that kept the most. "
            "EXPORT: [ragged] has %d%% of the original's parameters; UL structures from block 0 on lose nothing by padding",
            round(100 * ragged / original),
        )
