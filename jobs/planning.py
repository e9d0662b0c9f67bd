"""Which stages of a job run and which are reused, and why. Pure: stages, keys and the manifest in, a plan out.

The keys form a chain. The first stage's input is the model; every later one's is the stage before it. A stage's key is the
digest of everything that shapes its result, so a finished record with the same key is the same result. The plan is then
walked backwards from the result that is asked for: a stage whose artifact is there needs nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from algorithms.base import StageSpec
from configs.errors import DataError
from jobs.manifest import StageRecord, Status
from jobs.results.artifacts import Condition
from jobs.results.keys import DATA_SET, StageInputs


class Action(StrEnum):
    """What the runner does with a stage."""

    RUN = "run"
    REUSE = "reuse"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One line of the plan.

    ``key`` is the stage's own key, or the recorded one where an older result is reused. ``forced`` marks a stage whose finished
    result is made again, so that nothing of an earlier attempt may be kept. ``record`` is what the manifest knows of it.
    """

    spec: StageSpec
    action: Action
    reason: str
    key: str
    input_key: str
    tokens_key: str | None
    forced: bool = False
    warning: str | None = None
    record: StageRecord | None = None

    @property
    def result(self) -> StageRecord:
        """The record of a result that is reused."""
        assert self.record is not None, "only a recorded result is reused"
        return self.record


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages of a job, in order."""

    stages: tuple[PlannedStage, ...]

    @property
    def runs(self) -> tuple[PlannedStage, ...]:
        """The stages that will run."""
        return tuple(stage for stage in self.stages if stage.action is Action.RUN)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before it starts."""
        return tuple(stage.warning for stage in self.stages if stage.warning)

    @property
    def goal(self) -> PlannedStage:
        """The stage whose artifact is the result: the last one, unless STAGES ends earlier."""
        return next(stage for stage in reversed(self.stages) if stage.action is not Action.SKIP)

    @property
    def is_complete(self) -> bool:
        """Whether the result is the algorithm's own last one: the exported model."""
        return self.goal is self.stages[-1]

    @property
    def foundations(self) -> tuple[PlannedStage, ...]:
        """The reused stages whose artifact is read: by a stage that runs, or as the result."""
        pairs = zip(self.stages, [*(stage.action for stage in self.stages[1:]), None], strict=True)
        return tuple(
            stage for stage, after in pairs if stage.action is Action.REUSE and (stage is self.goal or after is Action.RUN)
        )

    def __getitem__(self, name: str) -> PlannedStage:
        return next(stage for stage in self.stages if stage.spec.name == name)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the recipe says about stages: which may run (``None`` is all), which to run again, and what that already did.

    ``overwrite`` is true for every stage, or names some. ``redone`` are the stages that an interrupted run of the same recipe
    has finished: they are not run a second time. ``command`` is what the user typed, for advice.
    """

    stages: tuple[str, ...] | None = None
    overwrite: bool | tuple[str, ...] = False
    redone: tuple[str, ...] = ()
    command: str = "python main.py --yaml_path RECIPE"

    def allows(self, name: str) -> bool:
        """Whether the stage may run."""
        return self.stages is None or name in self.stages

    def forces(self, name: str) -> bool:
        """Whether a finished result of the stage has to be made again."""
        wanted = self.overwrite is True or (self.overwrite is not False and name in self.overwrite)
        return wanted and self.allows(name) and name not in self.redone


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a plan depends on.

    ``source_key`` is the model's digest, the first stage's input; ``tokens_keys`` has an entry for every stage that asks for
    tokens. ``condition`` tells of a stage with a finished record whether its artifact is there and whole. ``known_stages`` are
    all that the algorithm has; some recipes leave some of them out. ``spelling`` gives the recipe's key of a setting, where it
    is not the setting's own name.
    """

    specs: Sequence[StageSpec]
    algorithm: str
    source_key: str
    tokens_keys: Mapping[str, str]
    records: Mapping[str, StageRecord]
    condition: Callable[[str, StageRecord], Condition]
    selection: Selection
    known_stages: Sequence[str] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)


def make_plan(situation: Situation) -> Plan:
    """Decide for every stage whether it runs, is reused or is not needed.

    Raises:
        DataError: a stage name that the algorithm does not have, or a stage that is needed, not finished and not selected.
    """
    _check_names(situation)
    strict: set[str] = set()
    while True:
        chain = _chain(situation, strict)
        plan = Plan(stages=_walk_back(chain, situation.selection))
        # A result made from other data counts as done only while it is there: if it has to be made again, then from today's
        # data, and everything after it follows. Each round adds a stage, so this ends.
        redo = {link.inputs.spec.name for link in chain if link.other_data and plan[link.inputs.spec.name].action is Action.RUN}
        if not redo:
            return plan
        strict |= redo


@dataclass(frozen=True, kw_only=True)
class _Link:
    """A stage in the chain of keys, before it is known what is needed.

    A ``damaged`` result is made again, and all that follows from it, but from those of its files that are intact.
    """

    inputs: StageInputs
    key: str
    usable: bool
    reason: str
    other_data: bool
    forced: bool
    damaged: bool
    record: StageRecord | None


def _chain(situation: Situation, strict: set[str]) -> list[_Link]:
    """The stages with their keys. From the first one that is made again, every later one is made again too."""
    links: list[_Link] = []
    input_key, cause = situation.source_key, ""
    for spec in situation.specs:
        inputs = StageInputs(
            spec=spec,
            algorithm=situation.algorithm,
            input_key=input_key,
            tokens_key=situation.tokens_keys.get(spec.name),
        )
        link = _link(inputs, situation, tolerant=spec.name not in strict, cause=cause)
        links.append(link)
        input_key = link.key
        if link.forced and not cause:
            cause = f"stage {spec.name!r} is made again"
    return links


def _link(inputs: StageInputs, situation: Situation, *, tolerant: bool, cause: str) -> _Link:
    spec, selection = inputs.spec, situation.selection
    record = situation.records.get(spec.name)
    other_data = tolerant and _differs_in_data_only(inputs, record)
    usable, forced, reason = False, bool(cause), _unfinished_reason(inputs, record, situation.spelling)
    damaged = False
    if record is not None and record.status is Status.FINISHED and (other_data or record.key == inputs.key):
        state = situation.condition(spec.name, record)
        usable, reason = state.intact, _condition_reason(state, record)
        damaged = state.damaged and selection.allows(spec.name) and not forced
        forced = forced or damaged
        if usable and cause:
            usable, reason = False, cause
    if selection.forces(spec.name) and record is not None:
        usable, forced, damaged, reason = False, True, False, "overwrite asks for it"
    other_data = other_data and not forced
    key = record.key if other_data and record is not None else inputs.key
    return _Link(
        inputs=inputs,
        key=key,
        usable=usable,
        reason=reason,
        other_data=other_data,
        forced=forced,
        damaged=damaged,
        record=record,
    )


def _walk_back(chain: Sequence[_Link], selection: Selection) -> tuple[PlannedStage, ...]:
    goal = max(index for index, link in enumerate(chain) if selection.allows(link.inputs.spec.name))
    planned: list[PlannedStage] = []
    needed = True
    for index in range(len(chain) - 1, -1, -1):
        link = chain[index]
        if index > goal:
            planned.append(_planned(link, Action.SKIP, "not among STAGES", counts=False))
        elif not needed:
            planned.append(_planned(link, Action.REUSE if link.usable else Action.SKIP, _idle_reason(link)))
        elif link.usable:
            planned.append(_planned(link, Action.REUSE, link.reason))
            needed = False
        elif selection.allows(link.inputs.spec.name):
            planned.append(_planned(link, Action.RUN, link.reason))
        else:
            raise DataError(_unselected(link, chain, selection))
    return tuple(reversed(planned))


def _planned(link: _Link, action: Action, reason: str, *, counts: bool = True) -> PlannedStage:
    """A line of the plan. A stage that ``counts`` is in the result, also where its own artifact has been deleted since."""
    spec, warning = link.inputs.spec, None
    if link.record is not None and link.other_data and counts and action is not Action.RUN:
        warning = (
            f"Stage {spec.name!r} was made from other data ({link.record.data}) and is reused as it is; "
            f"later stages use the recipe's data. To make it again from that: overwrite: [{spec.name}]."
        )
    return PlannedStage(
        spec=spec,
        action=action,
        reason=reason,
        key=link.key,
        input_key=link.inputs.input_key,
        tokens_key=link.inputs.tokens_key,
        forced=link.forced and not link.damaged,
        warning=warning,
        record=link.record,
    )


def _differs_in_data_only(inputs: StageInputs, record: StageRecord | None) -> bool:
    if record is None or record.status is not Status.FINISHED or not inputs.spec.reuse_on_new_data:
        return False
    return inputs.changes_since(record) == [DATA_SET]


def _unfinished_reason(inputs: StageInputs, record: StageRecord | None, spelling: Mapping[str, str]) -> str:
    if record is None:
        return "not run yet"
    changed = inputs.changes_since(record, spelling)
    if changed:
        return f"{', '.join(changed)} changed"
    how = {Status.RUNNING: "was killed", Status.FAILED: "failed", Status.INTERRUPTED: "was interrupted"}
    return f"{how.get(record.status, 'did not finish')}; it resumes where it stopped"


def _condition_reason(state: Condition, record: StageRecord) -> str:
    if state.damaged:
        return f"its result is damaged: {'; '.join(state.problems[:3])}"
    return f"finished {record.finished}" if state.intact else "its result has been deleted"


def _idle_reason(link: _Link) -> str:
    return link.reason if link.usable else "not needed: the result of a later stage is there"


def _check_names(situation: Situation) -> None:
    here = [spec.name for spec in situation.specs]
    known = list(dict.fromkeys([*here, *situation.known_stages]))
    stages, overwrite = situation.selection.stages, situation.selection.overwrite
    asked = {"STAGES": stages or (), "overwrite": () if isinstance(overwrite, bool) else overwrite}
    for key, names in asked.items():
        unknown = [name for name in names if name not in known]
        if unknown:
            raise DataError(f"{key}: {', '.join(unknown)}: no such stage. The stages of this recipe are {', '.join(here)}.")
    if not any(situation.selection.allows(name) for name in here):
        asked_for = f"{', '.join(stages)} is no part of this recipe" if stages else "nothing is selected"
        raise DataError(f"STAGES: {asked_for}. Leave the key out to run all stages, or name some of {', '.join(here)}.")


def _unselected(link: _Link, chain: Sequence[_Link], selection: Selection) -> str:
    names = [other.inputs.spec.name for other in chain if other is link or selection.allows(other.inputs.spec.name)]
    return (
        f"STAGES: stage {link.inputs.spec.name!r} is needed, not among them and not usable ({link.reason}). "
        f"Run it too: {selection.command} STAGES=[{','.join(names)}]"
    )
