import pytest

from algorithms.base import StageSpec, TokenRequest
from configs.errors import DataError
from jobs.manifest import StageRecord, Status
from jobs.planning import Action, Selection, Situation, make_plan
from jobs.results.artifacts import ABSENT, Condition, FileRecord
from jobs.results.keys import StageInputs, request_record

INTACT, DAMAGED = Condition(present=True), Condition(present=True, problems=("x is missing",))
REQUEST = TokenRequest(num_samples=4, sequence_length=8, seed=0)


def spec(name, tokens=None, settings=None, version=1):
    tolerant = name == "calibration"
    return StageSpec(
        name=name, run=None, directory=name, kind=name, tokens=tokens, settings=settings or {"a": 1}, version=version,
        reuse_on_new_data=tolerant,
    )  # fmt: skip


THREE = (spec("calibration", REQUEST), spec("finetune", REQUEST), spec("conversion"))


def finished(specs=THREE, data="A", status=Status.FINISHED):
    """Records as a complete run of ``specs`` leaves them."""
    records, input_key = {}, "model"
    for one in specs:
        inputs = StageInputs(spec=one, algorithm="X", input_key=input_key, tokens_key=data if one.tokens else None)
        records[one.name] = StageRecord(
            key=inputs.key, algorithm="X", version=one.version, settings=one.settings, input_key=input_key,
            tokens_key=inputs.tokens_key, request=request_record(one), data=data, kind=one.kind, directory=one.directory,
            status=status, started="", finished="then", files={"f": FileRecord(size=1, digest="")},
        )  # fmt: skip
        input_key = inputs.key
    return records


def planned(records=(), *, specs=THREE, data="A", conditions=(), source="model", known=(), spelling=None, **selection):
    plan = make_plan(
        Situation(
            specs=specs,
            algorithm="X",
            source_key=source,
            tokens_keys={one.name: data for one in specs if one.tokens},
            records=dict(records),
            condition=lambda name, record: dict(conditions).get(name, INTACT),
            selection=Selection(**selection),
            known_stages=known,
            spelling=spelling or {},
        )
    )
    return plan


def actions(*arguments, **options):
    return "".join(
        {Action.RUN: "r", Action.REUSE: "u", Action.SKIP: "-"}[s.action] for s in planned(*arguments, **options).stages
    )


def test_everything_runs_first_and_nothing_afterwards():
    assert actions() == "rrr"
    assert actions(finished()) == "uuu"


def test_equal_keys_come_from_equal_inputs_only():
    base = StageInputs(spec=THREE[0], algorithm="X", input_key="m", tokens_key="t")
    others = [
        StageInputs(spec=THREE[1], algorithm="X", input_key="m", tokens_key="t"),
        StageInputs(spec=spec("calibration", REQUEST, {"a": 2}), algorithm="X", input_key="m", tokens_key="t"),
        StageInputs(spec=spec("calibration", REQUEST, version=2), algorithm="X", input_key="m", tokens_key="t"),
        StageInputs(spec=THREE[0], algorithm="Y", input_key="m", tokens_key="t"),
        StageInputs(spec=THREE[0], algorithm="X", input_key="n", tokens_key="t"),
        StageInputs(spec=THREE[0], algorithm="X", input_key="m", tokens_key="u"),
    ]
    assert len({base.key, *(other.key for other in others)}) == 7
    assert base.key == StageInputs(spec=spec("calibration", REQUEST), algorithm="X", input_key="m", tokens_key="t").key


@pytest.mark.parametrize("status", [Status.RUNNING, Status.FAILED, Status.INTERRUPTED])
def test_only_finished_stages_are_reused(status):
    records = {"calibration": finished()["calibration"], "finetune": finished(status=status)["finetune"]}
    assert actions(records) == "urr"
    assert planned(records)["finetune"].reason.endswith("it resumes where it stopped")


def test_a_changed_setting_or_model_reaches_everything_after_it():
    specs = (THREE[0], spec("finetune", REQUEST, {"a": 2}), THREE[2])
    assert actions(finished(), specs=specs) == "urr"
    assert planned(finished(), specs=specs)["finetune"].reason == "the setting a changed"
    assert planned(finished(), specs=specs, spelling={"a": "A"})["finetune"].reason == "the setting A changed"
    assert actions(finished(), source="another") == "rrr"
    assert planned(finished(), source="another")["calibration"].reason == "its input changed"


def test_new_data_reuses_the_calibration_and_chains_on_its_recorded_key():
    plan = planned(finished(data="A"), data="B")
    assert [stage.action for stage in plan.stages] == [Action.REUSE, Action.RUN, Action.RUN]
    assert plan["calibration"].key == finished(data="A")["calibration"].key
    assert plan["finetune"].input_key == plan["calibration"].key
    assert "other data (A)" in plan.warnings[0]
    assert planned(finished()).warnings == ()


def test_new_data_together_with_another_change_runs_again():
    assert actions(finished(data="A"), data="B", source="another") == "rrr"
    more = TokenRequest(num_samples=8, sequence_length=8, seed=0)
    specs = (spec("calibration", more), *THREE[1:])
    assert actions(finished(data="A"), data="B", specs=specs) == "rrr"
    assert (
        planned(finished(data="A"), data="B", specs=specs)["calibration"].reason == "the calibration text it asks for changed"
    )


def test_the_result_alone_is_enough():
    gone = {"calibration": ABSENT, "finetune": ABSENT}
    assert actions(finished(), conditions=gone) == "--u"
    assert actions(finished(), conditions={**gone, "conversion": ABSENT}) == "rrr"
    assert actions(finished(), conditions={"calibration": ABSENT, "conversion": ABSENT}) == "-ur"


def test_a_calibration_on_other_data_that_is_gone_is_made_from_the_new_data():
    plan = planned(finished(data="A"), data="B", conditions={"calibration": ABSENT})
    assert [stage.action for stage in plan.stages] == [Action.RUN] * 3
    assert plan["calibration"].key == finished(data="B")["calibration"].key
    assert plan["conversion"].key == finished(data="B")["conversion"].key
    assert plan.warnings == ()


def test_damage_is_named_and_repaired_from_there_on():
    assert actions(finished(), conditions={"finetune": DAMAGED}) == "urr"
    plan = planned(finished(), conditions={"calibration": DAMAGED})
    assert [stage.action for stage in plan.stages] == [Action.RUN] * 3
    assert plan["calibration"].reason == "its result is damaged: x is missing"
    assert not plan["calibration"].forced  # its intact blocks are kept
    assert plan["conversion"].reason == "stage 'calibration' is made again"


def test_overwrite_reaches_what_follows_and_stops_where_an_interrupted_run_had_come():
    assert actions(finished(), overwrite=True) == "rrr"
    assert actions(finished(), overwrite=("finetune",)) == "urr"
    assert actions(finished(), overwrite=("finetune",), redone=("finetune",)) == "uuu"
    assert actions(finished(), overwrite=True, redone=("calibration",)) == "urr"
    plan = planned(finished(data="A"), data="B", overwrite=("calibration",))
    assert plan["calibration"].key == finished(data="B")["calibration"].key


def test_selected_stages_bound_the_job():
    assert actions(stages=("calibration",)) == "r--"
    assert actions(finished(), stages=("finetune",), overwrite=True) == "ur-"
    assert planned(stages=("calibration",)).goal.spec.name == "calibration"
    assert not planned(stages=("calibration",)).is_complete
    assert planned(finished()).is_complete


def test_a_needed_stage_that_is_not_selected_is_an_error_with_the_command():
    with pytest.raises(DataError, match=r"'finetune' is needed.*not run yet.*go STAGES=\[finetune,conversion\]"):
        planned({"calibration": finished()["calibration"]}, stages=("conversion",), command="go")


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"stages": ("tuning",)}, "STAGES: tuning"),
        ({"overwrite": ("tuning",)}, "overwrite: tuning"),
        ({"stages": ()}, "nothing is selected"),
    ],
)
def test_unknown_stage_names_are_errors(selection, said):
    with pytest.raises(DataError, match=said):
        planned(**selection)


def test_a_stage_that_this_recipe_leaves_out_may_be_named_but_not_alone():
    specs = (THREE[0], THREE[2])
    assert actions(specs=specs, stages=("calibration", "finetune"), known=("finetune",)) == "r-"
    with pytest.raises(DataError, match="finetune is no part of this recipe"):
        actions(specs=specs, stages=("finetune",), known=("finetune",))


def test_the_artifacts_to_verify_are_those_that_are_read():
    def verified(*arguments, **options):
        return [stage.spec.name for stage in planned(*arguments, **options).foundations]

    assert verified(finished()) == ["conversion"]
    assert verified(finished(), overwrite=("finetune",)) == ["calibration"]
    assert verified() == []
    assert verified(finished(), stages=("calibration",)) == ["calibration"]
