"""The plan of a job as a person reads it: what would run and why, where, how long, and how much disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from algorithms.workload import ModelShapes
from configs.errors import MissingEnvironmentError
from configs.loader import LoadedRecipe
from configs.recipe import Recipe
from jobs.estimation.forecast import Forecast, forecast
from jobs.estimation.prediction import TOTAL
from jobs.estimation.probe import ProbeError, probe
from jobs.estimation.requirements import shortages
from jobs.estimation.room import Room, free_disk
from jobs.execution.collaborators import Collaborators
from jobs.execution.preparation import Materials, build_algorithm, describe_data, gather
from jobs.logs import duration
from jobs.manifest import Manifest
from jobs.planning import Plan, make_plan
from jobs.reporting.summary import aligned, memory, size
from jobs.workspace import Workspace

_COSTS = ("expected cost", "time", "CPU", "peak memory", "disk", "from")


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What a job would do. ``plan`` is None where the model or the text is not there to compute keys from; ``notes`` say so.

    ``commands`` are those of other programs that the stages start, as a shell would read them. ``disk_bytes`` is at most what
    the stages that run will add, ``earlier_wall_s`` what the same stages took before. ``forecast`` is what all that runs is
    expected to cost, ``probe_s`` how long the probe behind it took.
    """

    paths: Mapping[str, str]
    rows: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...] = ()
    plan: Plan | None = None
    disk_bytes: int | None = None
    disk_free: int | None = None
    earlier_wall_s: float | None = None
    forecast: Forecast = field(default_factory=Forecast)
    probe_s: float | None = None

    def as_text(self) -> str:
        """The plan as plain lines."""
        width = max(len(name) for name, _, _ in self.rows)
        rows = [f"{name:{width}}  {action:5}  {reason}" for name, action, reason in self.rows]
        paths = [f"{label:8} {path}" for label, path in self.paths.items()]
        costs = ["", *aligned([_COSTS, *self.cost_rows()])] if self.cost_rows() else []
        facts = [f"{label:8} {text}" for label, text in self._facts()]
        commands = ["", "commands", *self.commands] if self.commands else []
        return "\n".join([*paths, "", *rows, *costs, "", *facts, *commands]).rstrip()

    def as_table(self) -> Group:
        """The plan as rich tables."""
        above, below = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
        for grid, lines in ((above, self.paths.items()), (below, self._facts())):
            for label, text in lines:
                grid.add_row(Text(label, style="bold"), Text(text))
        tables = [Table("stage", "", "why"), Table(*_COSTS)]
        for table, rows in zip(tables, (self.rows, self.cost_rows()), strict=True):
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
        commands = [Text("commands", style="bold"), *map(Text, self.commands)] if self.commands else []
        return Group(above, *(table for table in tables if table.row_count), below, *commands)

    def cost_rows(self) -> list[tuple[str, ...]]:
        """One row for everything that will run, and one for all of it."""
        lines = dict(self.forecast.predictions)
        if lines:
            lines[TOTAL] = self.forecast.total
        return [
            (
                name,
                duration(p.wall_s),
                duration(p.user_cpu_s),
                memory(p),
                size(p.disk_bytes) if p.disk_bytes else "",
                p.basis.value,
            )
            for name, p in lines.items()
        ]

    def _facts(self) -> list[tuple[str, str]]:
        lines = []
        if self.disk_bytes is not None:
            lines.append(("disk", f"at most {size(self.disk_bytes)} more, {size(self.disk_free or 0)} free"))
        if self.earlier_wall_s is not None:
            lines.append(("time", f"these stages took {duration(self.earlier_wall_s)} before"))
        if self.probe_s is not None:
            lines.append(("probe", f"took {duration(self.probe_s)}; a run of these stages shows what it foretold"))
        return lines + [("note", note) for note in self.notes]


def describe_job(
    loaded: LoadedRecipe,
    workspace: Workspace,
    manifest: Manifest,
    parts: Collaborators,
    device: torch.device,
    *,
    with_probe: bool = False,
) -> JobPlan:
    """Plan a job without creating or fetching anything; a probe works in the cache folder and leaves its figures there.

    Raises:
        DataError: STAGES or ``overwrite`` cannot be followed, or EXPORT names an unknown format.
    """
    recipe = loaded.recipe
    paths = {
        "job": str(workspace.job_dir),
        "logs": str(workspace.logs_dir),
        "cache": str(workspace.cache_dir),
        "model": recipe.model if recipe.custom_model_path is None else str(recipe.custom_model_path),
        "data": describe_data(recipe),
    }
    if not _model_is_here(recipe, workspace, manifest):
        return _blind_plan(loaded, manifest, parts, paths, f"{paths['model']} is not here yet; a run fetches or converts it.")
    try:
        materials = gather(loaded, workspace, parts.resolve_model(recipe, workspace), manifest, parts)
        situation = materials.situation(manifest, {})
    except (ValueError, OSError, MissingEnvironmentError) as error:
        return _blind_plan(loaded, manifest, parts, paths, f"Cannot tell yet: {error}")
    plan = make_plan(situation)
    paths["model"] = str(materials.source.directory)
    notes = [*loaded.warnings, *plan.warnings, *_refusals(materials, plan)]
    probed = None
    if with_probe and plan.runs:
        try:
            probed = probe(loaded, materials.source, workspace)
        except ProbeError as error:
            notes.append(f"{error} The figures are from shapes.")
    expected = forecast(materials, plan, manifest, device, probed)
    notes.extend(_shortages(materials, expected, device))
    if (recipe.num_processes or len(recipe.cuda_id)) > 1:
        notes.append("The expected costs are those of one process.")
    if loaded.recipe.evaluation is not None and loaded.recipe.evaluation.tasks:
        notes.append("The tasks of EVALUATION come on top: nobody knows their length before they have run.")
        folder = loaded.recipe.evaluation.task_folder
        if folder is not None and not folder.expanduser().is_dir():
            notes.append(f"A run would be refused: EVALUATION.task_folder: {folder} is no folder.")
    return JobPlan(
        paths=paths,
        rows=tuple((stage.spec.name, stage.action.value, stage.reason) for stage in plan.stages),
        notes=tuple(notes),
        commands=_commands(materials),
        plan=plan,
        disk_bytes=expected.total.disk_bytes,
        disk_free=free_disk(workspace.job_dir),
        earlier_wall_s=_earlier(plan),
        forecast=expected,
        probe_s=None if probed is None else probed.wall_s,
    )


def _shortages(materials: Materials, expected: Forecast, device: torch.device) -> list[str]:
    """What a run would warn of, or be refused for."""
    room, shapes = Room.here(materials.workspace.job_dir, device), ModelShapes.of(materials.source)
    found = shortages(materials.loaded, expected, room, shapes, written=materials.written_bytes())
    return [shortage.text if shortage.error is None else f"A run would be refused: {shortage.text}" for shortage in found]


def _refusals(materials: Materials, plan: Plan) -> list[str]:
    try:
        materials.preflight(plan)
    except (ValueError, MissingEnvironmentError) as error:
        return [f"A run would be refused: {error}"]
    return []


def _commands(materials: Materials) -> tuple[str, ...]:
    """What the stages would start; nothing where the recipe is refused anyway."""
    try:
        commands = materials.algorithm.commands(materials.source, materials.workspace.job_dir)
    except ValueError:
        return ()
    return tuple(shlex.join(command) for command in commands)


def _blind_plan(
    loaded: LoadedRecipe, manifest: Manifest, parts: Collaborators, paths: Mapping[str, str], problem: str
) -> JobPlan:
    """What can be said without the model or the text: which stages there are and what the manifest has of them."""
    recipe, rows = loaded.recipe, []
    for spec in build_algorithm(loaded, parts).stages():
        record = manifest.stages.get(spec.name)
        known = f"recorded as {record.status.value}, to be compared once the inputs are there" if record else "not run yet"
        asked = recipe.stages is None or spec.name in recipe.stages
        rows.append((spec.name, "run" if asked else "skip", known if asked else "not among STAGES"))
    return JobPlan(paths=paths, rows=tuple(rows), notes=(*loaded.warnings, problem))


def _model_is_here(recipe: Recipe, workspace: Workspace, manifest: Manifest) -> bool:
    """Whether the model can be read without fetching or converting it first."""
    if recipe.custom_model_path is not None:
        return (recipe.custom_model_path.expanduser() / "config.json").is_file() or bool(manifest.stages)
    if recipe.model_job is not None:
        return True  # or another job has to run first, and finding its result says so
    return Path(recipe.model).expanduser().is_dir() or (workspace.models_dir / recipe.model).is_dir()


def _earlier(plan: Plan) -> float | None:
    times = [stage.record.wall_s for stage in plan.runs if stage.record is not None and stage.record.files]
    return sum(times) if times and len(times) == len(plan.runs) else None
