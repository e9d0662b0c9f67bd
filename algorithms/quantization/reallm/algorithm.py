"""ReALLM: a coded residual, a low-rank part and magnitudes for every matrix, and their tuning (arXiv 2405.13155)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageSpec, TokenRequest
from algorithms.blockwise import stages as blockwise
from algorithms.blockwise.pipeline import BITS
from algorithms.formats.reallm.packed import LAYOUT
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.quantization.reallm import global_tuning
from algorithms.quantization.reallm.calibration import CALIBRATED, NAME, TUNED, ShapeOf, fit_blocks
from algorithms.quantization.reallm.config import BLOC, CALIBRATION, CONVERSION, GLOBAL, SURVEY, ReallmConfig
from algorithms.quantization.reallm.conversion import FORMATS, PACKED, PEFT, exporters, read_export
from algorithms.quantization.reallm.shapes import SHAPES, check_decoders, place, read_shapes, uniform_shape
from algorithms.quantization.reallm.survey import stage as survey
from algorithms.quantization.reallm.survey.sizes import check_sizes
from algorithms.quantization.reallm.workloads import workloads
from algorithms.workload import Workload

logger = logging.getLogger(__name__)

CONVERTED = f"{NAME}-conversion"


class Reallm(CompressionAlgorithm):
    """The plugin: a survey where bits are to be shared out, calibration, both tunings where they are asked for, conversion."""

    name = "ReALLM"
    formats = FORMATS

    def __init__(self, config: ReallmConfig, exports: Sequence[str] = ()) -> None:
        # The packed form is the small one, and no stock client reads it: without EXPORT both are written.
        super().__init__(config, exports or FORMATS[:2])
        self._config = config

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse bits that hold no decoder or are out of reach, and an adapter where a model should stand.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if self.exports[0] == PEFT:
            raise ValueError(
                f"EXPORT: the first format stands in the job folder itself, which has to be a model; peft is an adapter and "
                f"its base. Write EXPORT: [dense, peft] or [{PACKED}, peft]."
            )
        check_decoders(self._config, source)
        check_sizes(self._config, source)

    def stages(self) -> Sequence[StageSpec]:
        """In their order."""
        config = self._config
        request = TokenRequest(num_samples=config.num_samples, sequence_length=config.sequence_length, seed=config.seed)
        calibrates = {"tokens": request, "distributed": True, "reuse_on_new_data": True}
        first = []
        if config.target_bits is not None:
            first = [self._spec(SURVEY, self._survey, survey.KIND, survey.shaping(config), **calibrates)]
        return (
            *first,
            self._spec(
                CALIBRATION,
                self._calibrate,
                CALIBRATED,
                config.calibration_shaping,
                evaluates=config.eval_datasets,
                **calibrates,
            ),
            *self._tuning_stages(),
            self._spec(CONVERSION, self._convert, CONVERTED, {"exports": list(self.exports)}, directory="converted"),
        )

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Of every stage with a text."""
        return workloads(self._config, source, tokens)

    def open(self, artifact: Artifact) -> nn.Module:
        """What a stage after the survey has left, as a float32 model.

        Raises:
            ValueError: a survey, which holds no weights.
        """
        if artifact.kind == survey.KIND:
            raise ValueError(
                f"{artifact.directory} says how bits are shared out and holds no model; name a later stage's result."
            )
        if artifact.kind == CONVERTED:
            return read_export(artifact.directory)
        return blockwise.open_calibrated(artifact.directory, LAYOUT.dense_state)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component, and the number of compressed weights."""
        if artifact.kind == CONVERTED:
            return blockwise.read_json(artifact.directory / BITS)
        return blockwise.facts(artifact.directory)["bits"]

    def _tuning_stages(self) -> Sequence[StageSpec]:
        config, specs = self._config, []
        if config.block_tuning is not None:
            request = TokenRequest(
                num_samples=config.num_samples,
                sequence_length=config.sequence_length,
                seed=config.seed,
                validation_samples=config.held_out,
            )
            settings = {**config.calibration_shaping, "block_tuning": config.block_tuning.shaping}
            specs.append(
                self._spec(
                    BLOC, self._tune_blocks, TUNED, settings, tokens=request, distributed=True, evaluates=config.eval_datasets
                )
            )
        tuning = config.global_tuning
        if tuning is not None:
            request = TokenRequest(
                num_samples=tuning.num_samples,
                sequence_length=tuning.sequence_length,
                seed=tuning.seed,
                packed=not tuning.skip_grouping,
            )
            texts = tuning.eval_datasets or config.eval_datasets
            specs.append(
                self._spec(
                    GLOBAL,
                    lambda context, artifact: global_tuning.tune_globally(context, artifact, tuning),
                    global_tuning.KIND,
                    tuning.shaping,
                    tokens=request,
                    distributed=True,
                    evaluates=texts,
                )
            )
        return specs

    def _spec(
        self,
        name: str,
        run: Callable[[StageContext, Artifact], Artifact],
        kind: str,
        settings: Mapping[str, object],
        *,
        directory: str | None = None,
        tokens: TokenRequest | None = None,
        distributed: bool = False,
        reuse_on_new_data: bool = False,
        evaluates: Sequence[str] = (),
    ) -> StageSpec:
        return StageSpec(
            name=name,
            run=self._measured(name, run) if evaluates else run,
            directory=directory or name,
            kind=kind,
            settings=settings,
            tokens=tokens,
            distributed=distributed,
            reuse_on_new_data=reuse_on_new_data,
            evaluates=tuple(evaluates),
        )

    def _measured(
        self, name: str, run: Callable[[StageContext, Artifact], Artifact]
    ) -> Callable[[StageContext, Artifact], Artifact]:
        """A stage that says the perplexities of what it has made."""

        def measured(context: StageContext, artifact: Artifact) -> Artifact:
            """The stage, and then its texts."""
            made = run(context, artifact)
            if context.evaluate is not None:
                figures = dict(context.evaluate(self.load(made)))
                if context.ranks.is_main:
                    context.metrics({"event": "evaluation", "stage": name, "perplexity": figures})
                    logger.info("%s: %s", name, ", ".join(f"{text} perplexity {value:.5g}" for text, value in figures.items()))
            return made

        return measured

    def _survey(self, context: StageContext, artifact: Artifact) -> Artifact:
        return survey.look(context, self._config)

    def _shapes(self, artifact: Artifact) -> ShapeOf:
        if (artifact.directory / SHAPES).is_file():
            chosen = read_shapes(artifact.directory)
            return lambda index, name: chosen[place(index, name)]
        uniform = uniform_shape(self._config)
        return lambda index, name: uniform

    def _calibrate(self, context: StageContext, artifact: Artifact) -> Artifact:
        if artifact.kind == survey.KIND and context.ranks.is_main:
            shutil.copyfile(artifact.directory / SHAPES, context.output_dir / SHAPES)  # for the stages behind
        return fit_blocks(context, self._config, self._shapes(artifact))

    def _tune_blocks(self, context: StageContext, artifact: Artifact) -> Artifact:
        return fit_blocks(context, self._config, self._shapes(artifact), earlier=artifact.directory)

    def _convert(self, context: StageContext, artifact: Artifact) -> Artifact:
        atomic_write_json(context.output_dir / BITS, self.bits(artifact))
        return blockwise.convert(
            context, artifact, kind=CONVERTED, exports=self.exports, exporters=exporters(self._config.residual)
        )
