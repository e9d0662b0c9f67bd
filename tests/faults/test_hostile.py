"""Secrets stay secret, foreign code stays asleep, and no text of a recipe or a model steers what shows it."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.faults.kill import job_of
from tests.faults.warm_process import ROOT
from tests.support.source_tree import modules

SECRETS = {"HF_TOKEN": "hf_notForAnyonesEyes1234", "WANDB_API_KEY": "9f8e7d6c5b4a39281706f5e4d3c2b1a0deadbeef"}
MODEL = ROOT / "examples" / "quickstart" / "model"


def holders(folder: Path, text: str) -> list[str]:
    """The files below a folder whose content has the text in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes()]


@pytest.fixture
def betrayed(run, tmp_path):
    """A job whose recipe puts a secret wherever it can, and what it said. Only the caches of data sets are left out."""
    text = tmp_path / "texts" / f"{SECRETS['HF_TOKEN']}.jsonl"
    text.parent.mkdir()
    shutil.copy(next((ROOT / "examples" / "quickstart" / "data" / "calibration").glob("*.jsonl")), text)
    overrides = [f"DATA_PATH={text.parent}/${{oc.env:HF_TOKEN}}.jsonl", "TRACKING.project=${oc.env:WANDB_API_KEY}"]
    overrides += ["STAGES=[calibration,conversion]", "llm.AQLM.finetune_config=null"]
    done = run(tmp_path / "user", *overrides, environment=SECRETS)
    assert done.code == 0, done.said
    shutil.rmtree(tmp_path / "user" / ".cache")
    return tmp_path / "user", done.said


def test_no_secret_reaches_logs_manifest_recipe_card_or_report(betrayed):
    folder, said = betrayed
    assert [name for name, text in SECRETS.items() if text in said] == []
    assert {name: holders(folder, text) for name, text in SECRETS.items()} == {name: [] for name in SECRETS}
    job = job_of(folder)
    for name in ("recipe.yaml", "manifest.json", "README.md", "report.html"):
        assert "(secret)" in (job / name).read_text(), f"{name} does not speak of the text at all"


def test_no_secret_is_in_what_is_said_of_a_mistake(run, tmp_path):
    done = run(tmp_path / "user", "DATA_PATH=${oc.env:HF_TOKEN}/none", "CUDA_ID=${oc.env:WANDB_API_KEY}", environment=SECRETS)
    assert done.code == 2
    assert [name for name, text in SECRETS.items() if text in done.said] == []


@pytest.fixture
def with_code(tmp_path):
    """A model whose folder brings code along, which leaves a mark where it runs."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "configuration_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "mark"
    code = f"""
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({str(mark)!r}).touch()
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
    (folder / "configuration_own.py").write_text(code)
    return folder, mark


def test_code_of_a_model_runs_only_where_the_recipe_says_so(run, tmp_path, with_code):
    model, mark = with_code
    done = run(tmp_path / "user", f"MODEL={model}", "STAGES=[calibration]")
    assert done.code == 0, done.said
    assert not mark.exists()
    modules_cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    overrides = ["TRUST_REMOTE_CODE=true", "llm.AQLM.finetune_config=null", "EVALUATION=null", "JOB_ID=trusting"]
    done = run(tmp_path / "other", f"MODEL={model}", *overrides, environment=modules_cache)
    assert done.code == 0, done.said
    assert mark.exists()
    assert "TRUST_REMOTE_CODE: code that comes with" in done.said
    assert "was allowed to run" in (job_of(tmp_path / "other") / "README.md").read_text()


def test_text_of_a_recipe_steers_neither_terminal_nor_page(run, tmp_path):
    hostile = tmp_path / "\x1b[31m<script>alert(1)<" / "script>"
    shutil.copytree(MODEL, hostile)
    done = run(tmp_path / "user", f"MODEL={hostile}", "STAGES=[calibration,conversion]", "llm.AQLM.finetune_config=null")
    assert done.code == 0, done.said
    assert "\x1b" not in done.said
    assert "script" in done.said
    job, (log,) = job_of(tmp_path / "user"), (tmp_path / "user" / "logs").rglob("log.log")
    assert "\x1b" not in log.read_text()
    page = (job / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize("place", ["jobs/Kompress/sly", "jobs/Adapt", "logs/Kompress/sly"])
def test_nothing_is_written_through_a_link_that_a_name_leads_to(run, tmp_path, place):
    user, outside = tmp_path / "user", tmp_path / "outside"
    (outside / "faults").mkdir(parents=True)
    (user / place).parent.mkdir(parents=True)
    (user / place).symlink_to(outside, target_is_directory=True)
    done = run(user, "JOB_SERVICE=Adapt" if place.endswith("Adapt") else "JOB_ID=sly")
    assert done.code == 2, done.said
    assert "leads out of" in done.said, done.said
    assert [path for path in outside.rglob("*") if path.is_file()] == []


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a function by its last name."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in found if getattr(call.func, "attr", getattr(call.func, "id", "")) == name]


def test_no_shell_runs_a_command():
    offences = [
        f"{module.path}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.keyword) and node.arg == "shell"
    ]
    assert offences == []
    texts = {module.path: module.text for module in modules()}
    assert [
        path for path, text in texts.items() if re.search(r"\bos\.(system|popen|spawn\w*)\(|getoutput\(|tarfile|zipfile", text)
    ] == []


def test_whoever_loads_from_a_folder_passes_the_recipes_trust_on():
    """A literal True would run a model's code unasked."""
    found, guarded = [], "algorithms/formats/pruned/ragged.py"  # runs a copy of this repository's own file, compared bytewise
    for module in modules():
        for call in [*calls(module.tree, "from_pretrained"), *calls(module.tree, "from_config")]:
            trust = next((word.value for word in call.keywords if word.arg == "trust_remote_code"), None)
            if isinstance(trust, ast.Constant) and trust.value is not False:
                found.append(module.path)
    assert found == [guarded]
    assert any(calls(module.tree, "from_pretrained") for module in modules())
