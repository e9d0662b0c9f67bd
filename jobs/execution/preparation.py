"""From a recipe to what can be planned: the algorithm, the model, the keys of the tokens and the manifest."""

from __future__ import annotations

import logging
import platform
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch
import transformers

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.modeling.source import ModelSource
from configs.diagnosis import spellings
from configs.errors import DataError
from configs.loader import LoadedRecipe
from configs.recipe import Recipe
from jobs.execution.collaborators import Collaborators
from jobs.manifest import Manifest, RunRecord, StageRecord, Status, now, read_manifest
from jobs.model_layout import check_length
from jobs.planning import Plan, PlannedStage, Selection, Situation, make_plan
from jobs.reporting.model_card import NAME as CARD
from jobs.results.artifacts import ABSENT, Condition, canonical_digest, check_files
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a plan is made of. ``run`` is this call of the runner, or the interrupted one that it goes on with."""

    loaded: LoadedRecipe
    workspace: Workspace
    source: ModelSource
    algorithm: CompressionAlgorithm
    specs: Sequence[StageSpec]
    run: RunRecord
    parts: Collaborators

    def situation(self, manifest: Manifest, damaged: dict[str, Condition]) -> Situation:
        """What the plan depends on, with the artifacts in ``damaged`` known to be unusable."""
        recipe = self.loaded.recipe
        return Situation(
            specs=self.specs,
            algorithm=self.algorithm.name,
            source_key=self.source.digest,
            tokens_keys={
                spec.name: self.parts.tokens_key(recipe, spec.tokens, self.source)
                for spec in self.specs
                if spec.tokens is not None
            },
            records=manifest.stages,
            condition=lambda name, record: damaged.get(name) or self.locate(name, record)[1],
            selection=Selection(
                stages=recipe.stages,
                overwrite=self.loaded.parameters.overwrite,
                redone=self.run.redone,
                command=resume_command(self.loaded),
            ),
            known_stages=self.loaded.parameters.stage_names,
            spelling=spellings(type(self.loaded.parameters)),
        )

    def preflight(self, plan: Plan) -> None:
        """Let the algorithm refuse what cannot work, before any stage starts.

        Raises:
            DataError: from the algorithm, or something is asked for that the model cannot give; says which key to change.
            MissingEnvironmentError: from the algorithm; says what to install.
        """
        recipe = self.loaded.recipe
        if not self.algorithm.loads and recipe.evaluation is not None and not recipe.evaluation.is_empty:
            raise DataError(
                f"EVALUATION: what {self.algorithm.name} makes cannot be run by this program, so there are no figures of it. "
                "Leave EVALUATION out; `python main.py evaluate` has those of the uncompressed model."
            )
        here, allowed = {spec.name for spec in self.specs}, recipe.stages
        absent = [n for n in self.loaded.parameters.stage_names if n not in here and (allowed is None or n in allowed)]
        positions = self.source.config.to_dict().get("max_position_embeddings")
        for stage in plan.runs:
            length = 0 if stage.spec.tokens is None else stage.spec.tokens.sequence_length
            check_length(self.source, length, f"Lower model_seqlen of stage {stage.spec.name}")
            if positions is not None and length > positions:
                logger.warning(
                    "Stage %s asks for sequences of %d tokens, longer than the %d that the model was made for; lower its "
                    "model_seqlen.", stage.spec.name, length, positions,
                )  # fmt: skip
        with users_mistakes():
            self.algorithm.preflight(self.source, [*(stage.spec.name for stage in plan.runs), *absent])

    def locate(self, name: str, record: StageRecord, *, full: bool = False) -> tuple[Path, Condition]:
        """Where a recorded artifact is, and its condition: below tmp/, or for the exporting stage the job folder itself."""
        place = self.workspace.stage_dir(record.directory)
        state = check_files(place, record.files, full=full)
        if state.present or name != self.specs[-1].name:
            return place, state
        # The model card in the job folder is written anew after every evaluation; it is no part of the result.
        files = {file: entry for file, entry in record.files.items() if file != CARD}
        state = check_files(self.workspace.job_dir, files, full=full) if files else ABSENT
        return self.workspace.job_dir, state

    def verified_plan(self, manifest: Manifest) -> Plan:
        """The plan, after reading through every artifact that it builds on."""
        damaged: dict[str, Condition] = {}
        while True:
            plan = make_plan(self.situation(manifest, damaged))
            found = {stage.spec.name: self.locate(stage.spec.name, stage.result, full=True)[1] for stage in plan.foundations}
            worse = {name: state for name, state in found.items() if not state.intact}
            if not worse:
                return plan
            damaged |= worse

    def is_intact(self, artifact: Artifact | None) -> bool:
        """Whether an earlier result that no stage reads again may stand for what a later one was made of; a warning if not."""
        if artifact is None:
            return True
        stages = read_manifest(self.workspace.manifest_path).stages.values()
        files = next((record.files for record in stages if record.key == artifact.digest), {})
        state = check_files(artifact.directory, files, full=True) if files else ABSENT
        if state.damaged:
            problems = "; ".join(state.problems[:3])
            logger.warning("%s is damaged, and is done without: %s", artifact.directory, problems)
        return state.intact

    def written_bytes(self) -> int:
        """What stopped stages have left of their results, and need not write again."""
        folders = [self.workspace.partial_dir(spec.directory) for spec in self.specs]
        return sum(file.stat().st_size for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file())

    def artifact(self, planned: PlannedStage) -> Artifact:
        """The artifact of a stage that is reused."""
        return Artifact(kind=planned.spec.kind, directory=self.locate(planned.spec.name, planned.result)[0], digest=planned.key)


def gather(
    loaded: LoadedRecipe, workspace: Workspace, source: ModelSource, manifest: Manifest, parts: Collaborators
) -> Materials:
    """Put together what the plan needs; reads no weights and no text."""
    algorithm = build_algorithm(loaded, parts)
    with users_mistakes():
        _ = source.digest, source.num_parameters, source.config  # an incomplete model should show here, and by name
    return Materials(
        loaded=loaded,
        workspace=workspace,
        source=source,
        algorithm=algorithm,
        specs=tuple(algorithm.stages()),
        run=_this_run(manifest, recipe_digest(loaded)),
        parts=parts,
    )


@contextmanager
def users_mistakes() -> Iterator[None]:
    """What lower layers raise as a plain ``ValueError`` about the recipe or the model, as the error that ends a command tidily.

    Raises:
        DataError: with the same message.
    """
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def build_algorithm(loaded: LoadedRecipe, parts: Collaborators) -> CompressionAlgorithm:
    """The plugin of the recipe.

    Raises:
        DataError: EXPORT names a format that the plugin does not write.
    """
    recipe = loaded.recipe
    kind = parts.algorithm_class(recipe.algorithm)
    unknown = [name for name in recipe.export if name not in kind.formats]
    if unknown:
        raise DataError(f"EXPORT: {kind.name} does not write {', '.join(unknown)}. It writes {', '.join(kind.formats)}.")
    return kind(loaded.parameters, recipe.export)


def recipe_digest(loaded: LoadedRecipe) -> str:
    """Names the resolved recipe."""
    return canonical_digest(loaded.resolved)


def resume_command(loaded: LoadedRecipe) -> str:
    """The command that runs the same recipe with the same overrides, but for STAGES: the caller names the stages."""
    kept = [override for override in loaded.overrides if not override.startswith("STAGES=")]
    option = f"--{'json' if loaded.file.suffix == '.json' else 'yaml'}_path"
    return shlex.join(["python", "main.py", option, str(loaded.file), *kept])


def push_command(loaded: LoadedRecipe) -> str:
    """The command that uploads the recipe's result."""
    return resume_command(loaded).replace("main.py", "main.py push", 1)


def describe_data(recipe: Recipe) -> str:
    """The calibration text in one line."""
    name = str(recipe.data_path or recipe.dataset_name or "none")
    return f"{name}{f' ({recipe.dataset_subname})' if recipe.dataset_subname else ''}, split {recipe.split}"


def versions(processes: int) -> dict[str, object]:
    """What the result depends on beside the recipe, and what it was computed with."""
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    return {
        "bitpress": project["version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _this_run(manifest: Manifest, digest: str) -> RunRecord:
    """A new run, or the last one again where that was stopped on the way through the same recipe."""
    last = manifest.run
    if last is not None and not last.status.is_end and manifest.recipe_digest == digest:
        return replace(last, status=Status.RUNNING, finished=None)
    return RunRecord(id=uuid4().hex[:12], status=Status.RUNNING, started=now())
