"""The probe around its processes, which are played here: depths, refusals, folders."""

import json
from pathlib import Path

import pytest

from algorithms.modeling.source import ModelSource
from algorithms.registry import config_class
from algorithms.workload import ModelShapes
from configs.loader import load_recipe
from jobs.estimation.probe import ProbeError, probe
from jobs.workspace import open_workspace
from tests.support.models import save_family

RECIPE = """
ALGORITHM: GPTQ
JOB_ID: one
USER_FOLDER: {user_folder}
MODEL: {model}
LOGGING_PATH: {user_folder}/elsewhere
DATASET_NAME: text
STAGES: [conversion]
TRACKING: {{wandb: true}}
push_to_hub: org/name
EVALUATION: {{perplexity: [wikitext2], tasks: [gsm8k:5]}}
llm: {{GPTQ: {{nsamples: 4, model_seqlen: 16}}}}
"""
COST = {"peak_memory_bytes": 100, "peak_cuda_memory_bytes": None, "disk_bytes": 0, "resident_bytes": 50}


class Process:
    """Plays the process of a probe: ends with an error below ``refuses_below`` blocks, else costs a second a block."""

    def __init__(self, refuses_below: int = 0, code: int = 2) -> None:
        self.refuses_below, self.code, self.recipes, self.depths = refuses_below, code, [], []

    def __call__(self, recipe: Path, out: Path, log: Path) -> tuple[int, str]:
        loaded = load_recipe(recipe, plugin_config=config_class)
        depth = ModelSource(Path(loaded.recipe.model)).num_blocks
        self.recipes.append(loaded.recipe)
        self.depths.append(depth)
        self.text = open_workspace(loaded.recipe).datasets_dir / "text" / "a.txt"
        self.saw_text = self.text.is_file()
        if depth < self.refuses_below:
            return self.code, f"not {depth}"
        stages = {"calibration": {"user_cpu_s": 1.0 * depth, "wall_s": 2.0 * depth, **COST}}
        out.write_text(json.dumps({"stages": stages, "closing": {}}))
        return 0, ""


@pytest.fixture
def job(tmp_path):
    """A recipe, its model of 8 blocks and its workspace; the user folder has a data set."""
    model = save_family(tmp_path / "model", "llama", blocks=8)
    user_folder = tmp_path / "user_data"
    (user_folder / "datasets" / "text").mkdir(parents=True)
    (user_folder / "datasets" / "text" / "a.txt").write_text("a")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(user_folder=user_folder, model=model))
    loaded = load_recipe(recipe, plugin_config=config_class)
    return loaded, ModelSource(model), open_workspace(loaded.recipe)


def test_two_depths_are_measured_and_nothing_is_left(job):
    process = Process()
    probed = probe(*job, start=process)
    assert process.depths == [1, 2]
    assert process.saw_text, "data sets below the user folder are found"
    prediction = probed.predictions(ModelShapes.of(job[1]), ["calibration"])["calibration"]
    assert (prediction.user_cpu_s, prediction.wall_s, prediction.peak_memory_bytes) == (8.0, 16.0, 100)
    _, _, workspace = job
    assert list(workspace.cache_dir.iterdir()) == []
    assert not workspace.job_dir.exists()
    assert not (workspace.user_folder / "elsewhere").exists()


def test_the_probes_job_is_its_own(job):
    process = Process()
    probe(*job, start=process)
    loaded, _, workspace = job
    for recipe in process.recipes:
        assert recipe.stages is None, "a stage alone would miss what it works on"
        inside = open_workspace(recipe)
        assert inside.job_dir.is_relative_to(workspace.cache_dir)
        assert inside.logs_dir.is_relative_to(workspace.cache_dir)
        assert inside.cache_dir == workspace.cache_dir, "what was fetched once is not fetched again"
        assert recipe.dataset_name == loaded.recipe.dataset_name


def test_a_probe_uploads_and_tracks_nothing_and_answers_no_tasks(job):
    process = Process()
    probe(*job, start=process)
    for recipe in process.recipes:
        assert recipe.push_to_hub is None
        assert recipe.tracking.wandb is False
        assert (recipe.evaluation.tasks, recipe.evaluation.corpora) == ((), ("wikitext2",))


@pytest.mark.parametrize(("least", "depths"), [(2, [1, 2, 3]), (4, [1, 2, 4, 5])])
def test_a_recipe_that_needs_more_blocks_is_given_more(job, least, depths):
    process = Process(refuses_below=least)
    probed = probe(*job, start=process)
    assert process.depths == depths
    assert probed.predictions(ModelShapes.of(job[1]), ["calibration"])["calibration"].user_cpu_s == 8.0


def test_a_recipe_that_needs_most_blocks_is_not_probed(job):
    process = Process(refuses_below=5)
    with pytest.raises(ProbeError, match="cannot be probed on part of the model: not 4"):
        probe(*job, start=process)
    assert process.depths == [1, 2, 4]
    assert list(job[2].cache_dir.iterdir()) == []


def test_any_other_end_says_what_the_process_said(job):
    with pytest.raises(ProbeError, match="ended with 4: not 1"):
        probe(*job, start=Process(refuses_below=2, code=4))


def test_being_stopped_leaves_nothing(job):
    def stopped(recipe: Path, out: Path, log: Path) -> tuple[int, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(*job, start=stopped)
    assert list(job[2].cache_dir.iterdir()) == []
