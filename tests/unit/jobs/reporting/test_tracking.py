"""Tracking: with a stand-in that notes what it is asked for, and with wandb itself on disk, read back."""

import json
import logging
import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from algorithms.quantization.aqlm.config import AqlmConfig
from algorithms.quantization.spqr.config import SpqrConfig
from configs.errors import DataError, MissingEnvironmentError
from configs.recipe import TrackingConfig
from jobs.reporting.tracking import RUN_FILE, check_tracking, tracking, wants_tracking
from jobs.workspace import open_workspace
from tests.support import fake_job
from tests.support.recipes import SMALL, load
from tests.unit.jobs.reporting.wandb_file import history, run_record

KEY = "0123456789abcdef0123456789abcdef01234567"


class Trouble(Exception):  # noqa: N818 - wandb's is called Error
    """What the stand-in raises."""


class Wandb(ModuleType):
    """A stand-in for the module; ``fails`` names the modes that it cannot start in, ``breaks`` the call that fails."""

    def __init__(self, fails: tuple[str | None, ...] = (), breaks: str = "") -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=Trouble)
        self.fails, self.breaks, self.started, self.lines, self.ends = fails, breaks, [], [], []
        self.is_silent, self.teardowns = False, 0

    def setup(self, settings):
        self.is_silent = settings["silent"]

    def teardown(self):
        self.teardowns += 1

    def Settings(self, **settings):  # noqa: N802 - the library's name
        return settings

    def init(self, **arguments):
        self.started.append(arguments)
        if arguments["mode"] in self.fails:
            raise Trouble("no answer")
        settings = SimpleNamespace(sync_dir=f"{arguments['dir']}/wandb/offline-run-1-{arguments['id']}")
        return SimpleNamespace(log=self.log, finish=self.finish, id=arguments["id"], settings=settings, url="https://w/run")

    def log(self, line, step):
        self.lines.append((step, line))
        if self.breaks == "log":
            raise Trouble("connection lost")

    def finish(self, exit_code):
        self.ends.append(exit_code)
        if self.breaks == "finish":
            raise BrokenPipeError


@pytest.fixture
def wandb(monkeypatch):
    """Puts a stand-in in place of wandb."""

    def put(**behaviour) -> Wandb:
        module = Wandb(**behaviour)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def job(folder, **asked):
    """A recipe that asks for tracking, and its workspace, which is there."""
    loaded = fake_job.recipe(folder, envelope={"TRACKING": asked or {"wandb": True}})
    workspace = open_workspace(loaded.recipe)
    workspace.create()
    return loaded, workspace


def start(folder, environment, **asked) -> None:
    loaded, workspace = job(folder, **asked)
    with tracking(loaded, workspace, environment) as track:
        track({"loss": 1.0})


def test_without_being_asked_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    loaded, workspace = job(tmp_path, project="p")
    check_tracking(loaded, {"WANDB_MODE": "nonsense"})
    with tracking(loaded, workspace, {}) as track:
        track({"loss": 1.0})
    assert not (workspace.job_dir / RUN_FILE).exists()


def test_without_the_package_the_job_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingEnvironmentError, match="pip install"):
        fake_job.run(tmp_path, envelope={"TRACKING": {"wandb": True}})
    assert not (tmp_path / "user_data").exists()


def test_a_mode_that_wandb_does_not_know_is_refused(tmp_path, wandb):
    wandb()
    with pytest.raises(DataError, match=r"WANDB_MODE=airplane.*offline"):
        check_tracking(job(tmp_path)[0], {"WANDB_MODE": "airplane"})


@pytest.mark.parametrize(
    ("algorithm", "said", "wanted"),
    [
        (AqlmConfig(), None, False),
        (AqlmConfig(calibration_config={"wandb": True}), None, True),
        (AqlmConfig(finetune_config={"wandb": True}), None, True),
        (AqlmConfig(finetune_config=None), None, False),
        (AqlmConfig(calibration_config={"wandb": True}), False, False),
        (SpqrConfig(wandb=True), None, True),
        (SpqrConfig(), True, True),
    ],
)
def test_the_recipe_s_block_or_else_the_algorithm_s_keys_ask_for_it(tmp_path, algorithm, said, wanted):
    loaded = fake_job.recipe(tmp_path)
    block = TrackingConfig(wandb=said)
    for recipe in (loaded.recipe.model_copy(update={"tracking": block}), *([loaded.recipe] if said is None else [])):
        assert wants_tracking(replace(loaded, recipe=recipe, parameters=algorithm)) == wanted


def test_asking_for_it_shapes_no_result():
    assert SpqrConfig(wandb=True).shaping == SpqrConfig().shaping
    tuned, plain = AqlmConfig(finetune_config={"wandb": True}), AqlmConfig()
    assert tuned.finetune_config.shaping == plain.finetune_config.shaping


def test_a_block_that_does_not_ask_is_told_so(tmp_path):
    lines = load(SMALL + "TRACKING: {project: mine}\n", tmp_path).warnings
    assert any("TRACKING has no effect" in line for line in lines)
    asked = load(SMALL + "TRACKING: {project: mine}\n", tmp_path, "llm.AQLM.calibration_config.wandb=true")
    assert not any("TRACKING" in line for line in asked.warnings)


def test_the_recipe_comes_before_the_environment_and_that_before_defaults(tmp_path, wandb):
    module = wandb()
    environment = {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team", "WANDB_NAME": "night", "WANDB_API_KEY": KEY}
    start(tmp_path, {"NETRC": "/nonexistent"})
    start(tmp_path, environment)
    start(tmp_path, environment, wandb=True, project="mine", entity="me", name="day")
    start(tmp_path, {**environment, "WANDB_MODE": "disabled"})
    given = [tuple(arguments[key] for key in ("project", "entity", "name", "mode")) for arguments in module.started]
    assert given == [
        ("bitpress", None, "one", "offline"),
        ("theirs", "team", "night", None),
        ("mine", "me", "day", None),
        ("theirs", "team", "night", "disabled"),
    ]
    assert len({arguments["id"] for arguments in module.started}) == 1, "a job that is resumed is the same run"
    assert {arguments["resume"] for arguments in module.started} == {"allow"}
    start(tmp_path / "other", {})
    assert module.started[-1]["id"] != module.started[0]["id"]


def test_no_secret_reaches_it(tmp_path, wandb):
    module = wandb()
    loaded, workspace = job(tmp_path)
    resolved = {**loaded.resolved, "FORMAT_STRING": f"Bearer {KEY}", "llm": {"FAKE": {"list": [KEY, 3], KEY: True}}}
    with tracking(replace(loaded, resolved=resolved), workspace, {"MY_TOKEN": KEY, "WANDB_API_KEY": KEY[:20]}):
        pass
    assert KEY[:20] not in json.dumps(module.started[0], default=str)
    assert module.started[0]["config"]["llm"]["FAKE"] == {"list": ["(secret)", 3], "(secret)": True}
    assert module.started[0]["settings"]["x_disable_meta"]


def test_trouble_with_the_network_does_not_end_a_job(tmp_path, wandb, caplog):
    module = wandb(fails=(None,))
    start(tmp_path, {"WANDB_API_KEY": KEY})
    assert [arguments["mode"] for arguments in module.started] == [None, "offline"]
    assert (module.lines, module.teardowns, module.is_silent) == ([(0, {"loss": 1.0})], 1, True)
    for behaviour in ({"fails": (None, "offline")}, {"breaks": "log"}, {"breaks": "finish"}):
        caplog.clear()
        module = wandb(**behaviour)
        loaded, workspace = job(tmp_path)
        with tracking(loaded, workspace, {"WANDB_API_KEY": KEY}) as track:
            track({"loss": 1.0})
            track({"loss": 2.0})
        assert "wandb" in caplog.text
        assert len(module.lines) == {"log": 1, "finish": 2}.get(behaviour.get("breaks"), 0)


def test_a_job_that_fails_is_a_run_that_failed(tmp_path, wandb):
    module = wandb()
    start(tmp_path, {})
    with pytest.raises(KeyboardInterrupt), tracking(*job(tmp_path), {}):
        raise KeyboardInterrupt
    assert module.ends == [0, 1]


def test_wandb_itself_keeps_the_lines_of_metrics_jsonl_under_their_names(tmp_path, monkeypatch, caplog):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    caplog.set_level(logging.INFO)
    measured = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 10}}
    options = {"envelope": {"TRACKING": {"wandb": True, "project": "p"}, **measured}}
    fake_job.run(tmp_path, **options)
    fake_job.run(tmp_path, **options, scale=0.25)  # the same job goes on: one run in two files, numbered on
    files = sorted((tmp_path / "user_data/logs/Kompress/one/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    logged = [line for file in files for line in history(file)]
    lines = [json.loads(line) for line in (fake_job.job_dir(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert [line.pop("_step") for line in logged] == list(range(6))
    assert [{name: value for name, value in line.items() if not name.startswith("_")} for line in logged] == lines
    runs = [run_record(file) for file in files]
    assert {run.run_id for run in runs} == {json.loads((fake_job.job_dir(tmp_path) / RUN_FILE).read_text())["run_id"]}
    assert {(run.project, run.display_name) for run in runs} == {("p", "one")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["llm"]["FAKE"]["scale"] == 0.5
    assert "wandb sync" in caplog.text
    assert str(files[0].parent) in caplog.text
