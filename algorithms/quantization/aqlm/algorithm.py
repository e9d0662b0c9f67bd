"""AQLM: additive quantization with learned codebooks, tuned block by block (arXiv 2401.06118)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageSpec, TokenRequest
from algorithms.blockwise.pipeline import linear_shapes
from algorithms.formats.aqlm import packed_linears
from algorithms.modeling.source import ModelSource
from algorithms.quantization.aqlm import stages
from algorithms.quantization.aqlm.config import AqlmConfig
from algorithms.quantization.aqlm.tuning import TUNED, finetune
from algorithms.quantization.aqlm.weight import stored_bits
from algorithms.workload import ModelShapes, Workload

# Keys that change how a calibration runs, not what comes out of it beyond rounding: an out-of-memory remedy keeps all blocks.
_NOT_SHAPING = {
    "local_batch_size", "offload_activations", "use_checkpointing", "print_frequency", "skip_out_loss", "no_quant", "resume",
    "trust_remote_code", "use_fast_tokenizer", "new_eval", "exp_name", "devices", "load", "on_save", "use_faiss", "wandb", "lr",
    "num_samples", "sequence_length", "validation_size",
}  # fmt: skip


_ROUNDS, _KMEANS_ITERATIONS = 12, 30  # of a fit, as they usually come out


class Aqlm(CompressionAlgorithm):
    """The plugin: stages calibration, finetune (PV-Tuning, where the recipe asks for it) and conversion."""

    name = "AQLM"
    formats = ("aqlm", "dense")

    def __init__(self, config: AqlmConfig, exports: Sequence[str] = ()) -> None:
        super().__init__(config, exports)
        self._calibration = config.calibration_config
        self._tuning = config.finetune_config if config.tunes else None

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse groups that do not divide the model's matrices, and codes that do not fit what the tuning keeps them in.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if "calibration" in stages:
            check_shapes(source, in_group=self._calibration.in_group_size, out_group=self._calibration.out_group_size)
        if "finetune" in stages and self._tuning is not None:
            check_container(self._tuning.code_dtype, self._calibration.bits_per_codebook)
        if "conversion" in stages and "aqlm" in self.exports and source.architecture.experts is not None:
            raise ValueError("EXPORT: aqlm: transformers has no experts with AQLM's codes. EXPORT: [dense] holds them.")

    def stages(self) -> Sequence[StageSpec]:
        """The stages of the recipe, with the settings that shape each."""
        config = self._calibration
        settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NOT_SHAPING}
        if config.targets == "original":
            settings.pop("true_sequential")  # implied
        if config.min_expert_tokens is None:
            settings.pop("min_expert_tokens", None)
        return (
            StageSpec(
                name="calibration",
                run=self._calibrate,
                directory="calibration",
                kind=stages.CALIBRATED,
                settings=settings,
                tokens=TokenRequest(
                    num_samples=config.num_samples,
                    sequence_length=config.sequence_length,
                    seed=config.seed,
                    validation_samples=config.validation_size,
                ),
                distributed=True,
                reuse_on_new_data=True,
                version=2,  # 2: the residual stream's distance is in the targets of the linears that write to it
            ),
            *self._tuning_stages(),
            StageSpec(
                name="conversion",
                run=self._convert,
                directory="converted",
                kind=stages.CONVERTED,
                settings={"exports": list(self.exports)},
            ),
        )

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Calibration: the walk with its tuning, and every weight's share of scoring all codewords, round after round."""
        config, tuning, shapes = self._calibration, self._tuning, ModelShapes.of(source)
        scores = 2.0 * config.num_codebooks * 2**config.bits_per_codebook
        rounds = _ROUNDS * config.beam_size + _KMEANS_ITERATIONS
        fits = shapes.blocks * shapes.block_parameters * (scores * rounds + 2.0 * _ROUNDS * shapes.hidden)
        walk = shapes.walk(tokens["calibration"], tuning_epochs=config.finetune_max_epochs)
        found = {"calibration": walk.plus(fits)}
        if tuning is not None:
            found["finetune"] = shapes.distillation(
                tokens["finetune"],
                epochs=tuning.max_epochs,
                sequences=tuning.microbatch_size or tuning.batch_size,
                length=tuning.sequence_length,
            )
        return found

    def open(self, artifact: Artifact) -> nn.Module:
        """A calibration, tuned or not, or a converted checkpoint as a float32 model."""
        if artifact.kind in (stages.CALIBRATED, TUNED):
            return stages.open_calibrated(artifact.directory)
        return stages.open_converted(artifact.directory)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits of codes, codebooks and scales over all compressed linears, and the number of weights they hold."""
        shapes: dict[str, tuple[int, ...]] = {}
        totals: Counter[str] = Counter()
        for path in sorted(artifact.directory.glob("*.safetensors")):
            shapes |= {f"{path.stem} {name}" if path.stem.isdecimal() else name: shape for name, shape in _shapes(path).items()}
        for prefix in packed_linears(list(shapes)):
            codes, codebooks = shapes[f"{prefix}.codes"], shapes[f"{prefix}.codebooks"]
            totals.update(stored_bits(codes, codebooks))
            totals["parameters"] += codes[0] * codes[1] * codebooks[2] * codebooks[3]
        return dict(totals)

    def _tuning_stages(self) -> Sequence[StageSpec]:
        tuning = self._tuning
        if tuning is None:
            return ()
        request = TokenRequest(
            num_samples=tuning.num_samples,
            sequence_length=tuning.sequence_length,
            seed=tuning.seed,
            packed=not tuning.skip_grouping,
        )
        return (
            StageSpec(
                name="finetune",
                run=lambda context, artifact: finetune(context, artifact, tuning),
                directory="finetune",
                kind=TUNED,
                settings=tuning.shaping,
                tokens=request,
                distributed=True,
                evaluates=tuple(name for name in tuning.eval_datasets if ":" not in name),  # tasks: see FinetuneConfig
            ),
        )

    def _calibrate(self, context: StageContext, _artifact: Artifact) -> Artifact:
        return stages.calibrate(context, self._calibration)

    def _convert(self, context: StageContext, artifact: Artifact) -> Artifact:
        return stages.convert(context, artifact, self._calibration, self.exports)


def check_shapes(source: ModelSource, *, in_group: int, out_group: int) -> None:
    """Every linear must be a whole number of groups in both directions.

    Raises:
        ValueError: lists all that are not.
    """
    wrong = []
    for name, (rows, columns) in linear_shapes(source).items():
        if rows % out_group or columns % in_group:
            wrong.append(f"{name} [{rows}, {columns}]")
    if wrong:
        raise ValueError(
            f"llm.AQLM.calibration_config: groups of {out_group} x {in_group} do not divide {', '.join(wrong)}; "
            "choose an in_group_size that divides the number of columns and an out_group_size that divides the rows."
        )


def check_container(code_dtype: str, bits: int) -> None:
    """The dtype in which codes are kept while they are tuned has to hold them.

    Raises:
        ValueError: it does not.
    """
    width = int(code_dtype.lstrip("uint"))
    if bits > width:
        raise ValueError(
            f"llm.AQLM.finetune_config.code_dtype: {code_dtype} cannot hold codes of nbits_per_codebook={bits}; "
            f"choose uint16 or leave the key out."
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 - not iterable
