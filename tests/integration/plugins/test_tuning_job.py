"""PV-Tuning through main.py: a calibration tuned later on another text, on two ranks, and stopped in the middle.

The quickstart's model is used because it is trained: a perplexity says nothing of a model whose weights are random.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import main

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "examples" / "quickstart"
TEXTS = QUICKSTART / "data"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TWO = "NUM_PROCESSES=2"
UNJUDGED = "EVALUATION=null"
CALIBRATION = {
    "nsamples": 32, "val_size": 0, "model_seqlen": 64, "num_codebooks": 2, "nbits_per_codebook": 6, "in_group_size": 4,
    "init_max_iter": 3, "max_epochs": 2, "finetune_max_epochs": 1, "seed": 0,
}  # fmt: skip
TUNING = {
    "skip_grouping": True, "model_seqlen": 64, "max_epochs": 4, "batch_size": 8, "microbatch_size": 4, "lr": 1e-3,
    "code_lr": 0.02, "eval_datasets": [], "save_every_steps": 2, "keep_best_model": True,
}  # fmt: skip
STEPS = 4 * 3  # epochs of 23 sequences in batches of 8


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a recipe, below which the job and its logs are."""

    folder: Path

    @property
    def recipe(self):
        return self.folder / "recipe.yaml"

    @property
    def job(self):
        return self.folder / "user_data" / "jobs" / "Kompress" / "tuned"

    @property
    def manifest(self):
        return json.loads((self.job / "manifest.json").read_text())

    @property
    def report(self):
        return json.loads((self.job / "tmp" / "finetune" / "tuning.json").read_text())

    @property
    def perplexity(self):
        return self.manifest["evaluation"]["figures"][0]["perplexity"]

    @property
    def errors(self):
        """Of each block, what its linears lost in the calibration, added up."""
        lines = map(json.loads, (self.job / "metrics.jsonl").read_text().splitlines())
        blocks = [line["linears"].values() for line in lines if line.get("event") == "block"]
        return [sum(linear["relative_error"] for linear in linears) for linears in blocks]

    def copied(self, folder):
        """The job as it stands, elsewhere; the recipe names the new place."""
        shutil.copytree(self.folder, folder / "place", symlinks=True)
        other = Place(folder / "place")
        other.recipe.write_text(self.recipe.read_text().replace(str(self.folder), str(other.folder)))
        return other

    def start(self, *overrides, launcher=()):
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "main.py"), "--yaml_path", str(self.recipe), *overrides],
            cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *overrides, launcher=()):
        process = self.start(*overrides, launcher=launcher)
        said = "".join(process.communicate(timeout=240))
        assert process.returncode == 0, said
        return said

    def stopped_after(self, step, process):
        """Waits until so many steps are done, and says so if that never comes."""
        deadline = time.monotonic() + 120
        metrics = self.job / "metrics.jsonl"
        while not (metrics.is_file() and f'"event": "step", "step": {step},' in metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the tuning never came to this step"
            time.sleep(0.01)

    def rank(self, number):
        """The process of one rank of this job."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words, variables = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            if str(self.recipe).encode() in words and f"RANK={number}".encode() in variables:
                return int(entry.name)
        raise AssertionError(f"rank {number} is not there")


def weights(place: Place) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.job.glob("*.safetensors"))}


def recipe(folder: Path) -> dict:
    return {
        "ALGORITHM": "AQLM", "JOB_ID": "tuned", "USER_FOLDER": str(folder / "user_data"),
        "MODEL": str(QUICKSTART / "model"), "DATA_PATH": str(folder / "a.jsonl"), "CORPORA": {"held": str(folder / "held.txt")},
        "EVALUATION": {"perplexity": ["held"], "sequence_length": 64},
        "llm": {"AQLM": {
            "save_intermediate_results": True, "calibration_config": CALIBRATION, "finetune_config": TUNING,
        }},
    }  # fmt: skip


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A recipe with the two texts that a model is made on, and one to judge by; nothing has run."""
    folder = tmp_path_factory.mktemp("fresh") / "place"
    folder.mkdir()
    for name, text, lines in (("a", "wikitext2_valid", 200), ("b", "gsm8k_train", 24)):
        taken = (TEXTS / "calibration" / f"{text}.jsonl").read_text().splitlines()[:lines]
        (folder / f"{name}.jsonl").write_text("\n".join(taken) + "\n")
    (folder / "held.txt").write_text((TEXTS / "evaluation" / "wikitext2_test.txt").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    return Place(folder)


@pytest.fixture(scope="module")
def calibrated(fresh, tmp_path_factory):
    """A job of which the calibration alone has run, on text A."""
    place = fresh.copied(tmp_path_factory.mktemp("calibrated"))
    place.run("STAGES=[calibration]", UNJUDGED)
    assert list(place.manifest["stages"]) == ["calibration"]
    return place


@pytest.fixture(scope="module")
def alone(calibrated, tmp_path_factory):
    """The whole job on one process, with the text of the tuning named in the second run."""
    place = calibrated.copied(tmp_path_factory.mktemp("alone"))
    place.run(on_b(place))
    return place


def on_b(place: Place) -> str:
    return f"DATA_PATH={place.folder / 'b.jsonl'}"


@pytest.fixture(scope="module")
def shared(fresh, tmp_path_factory):
    """The same job on two processes from the start, the second run under torchrun; with what that run said."""
    place = fresh.copied(tmp_path_factory.mktemp("shared"))
    place.run("STAGES=[calibration]", UNJUDGED, TWO)
    return place, place.run(on_b(place), launcher=TORCHRUN)


def test_a_calibration_on_one_text_is_tuned_on_another_under_torchrun(shared):
    place, said = shared
    assert "calibration: reuse" in said
    assert re.search(r"Stage 'calibration' was made from other data", said), "the user is warned"
    assert "Stage finetune: 2 processes" in said
    stages = place.manifest["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("calibration", "finetune", "conversion"), "finished"
    )
    assert stages["calibration"]["data"].endswith("a.jsonl, split train")
    assert stages["finetune"]["data"].endswith("b.jsonl, split train")
    assert stages["finetune"]["tokens"] != stages["calibration"]["tokens"], "tokens are made anew"
    assert len(list((place.job / "tmp" / "tokenized_dataset").iterdir())) == 2
    assert len(place.report["losses"]) == STEPS
    assert place.report["losses"][-1] < 0.9 * place.report["losses"][0]
    assert {"0.safetensors", "1.safetensors", "tuning.json"} <= {p.name for p in (place.job / "tmp" / "finetune").iterdir()}
    assert (place.job / "tmp" / "converted" / "config.json").is_file()


def test_the_tuned_model_is_certified_and_loads_from_the_job_folder(shared):
    place, _ = shared
    (certificate,) = json.loads((place.job / "certificate.json").read_text())["formats"]
    assert (certificate["format"], certificate["verdict"]) == ("aqlm", "passed")
    model = AutoModelForCausalLM.from_pretrained(place.job, dtype=torch.float32)
    changed = place.report["changed_codes"]
    linear = max(changed, key=changed.get)
    index, name = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", linear).groups()
    before, tuned = (load_file(place.job / "tmp" / stage / f"{index}.safetensors") for stage in ("calibration", "finetune"))
    differs = (tuned[f"{name}.codes"] != before[f"{name}.codes"]).any(-1)
    assert differs.float().mean().item() == pytest.approx(changed[linear])
    assert differs.any()
    assert torch.equal(model.get_submodule(linear).codes, tuned[f"{name}.codes"])
    assert torch.equal(model.get_submodule(linear).scales.flatten(), tuned[f"{name}.scales"].float().flatten())


def test_two_processes_make_a_model_of_the_same_quality(alone, shared):
    place, _ = shared
    assert place.perplexity == pytest.approx(alone.perplexity, rel=5e-3)
    assert place.errors == pytest.approx(alone.errors, rel=0.03)
    assert mean(place.report["losses"][-3:]) == pytest.approx(mean(alone.report["losses"][-3:]), rel=0.2)


def test_losing_a_rank_in_the_middle_ends_with_a_sentence_and_one_process_goes_on(calibrated, alone, tmp_path):
    place = calibrated.copied(tmp_path)
    process = place.start(on_b(place), UNJUDGED, TWO)
    place.stopped_after(5, process)
    begin = time.monotonic()
    os.kill(place.rank(1), signal.SIGKILL)
    errors = process.communicate(timeout=90)[1]
    assert time.monotonic() - begin < 60
    assert process.returncode == 75
    assert errors.count("Rank 1 of the job was killed by SIGKILL") == 1
    assert "Traceback" not in errors
    assert place.manifest["stages"]["finetune"]["status"] == "interrupted"
    assert not (place.job / "config.json").exists()
    assert listed(place) == {"calibration": "finished", "finetune": "interrupted"}
    said = place.run(on_b(place), UNJUDGED)
    (step,) = re.findall(rf"PV-Tuning goes on after step (\d+) of {STEPS}", said)
    assert int(step) in range(4, STEPS, 2)
    assert place.report["losses"][: int(step)] == pytest.approx(alone.report["losses"][: int(step)], rel=1e-3)
    assert len(place.report["losses"]) == STEPS
    assert place.report["losses"] == pytest.approx(alone.report["losses"], rel=2e-2)
    assert place.manifest["stages"]["finetune"]["attempts"] == 2


def test_stopped_in_the_middle_a_process_alone_goes_on_to_the_same_bits(calibrated, alone, tmp_path):
    place = calibrated.copied(tmp_path)
    process = place.start(on_b(place), UNJUDGED)
    place.stopped_after(3, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "Interrupted; what is finished is kept. To resume:" in errors
    assert place.manifest["stages"]["finetune"]["status"] == "interrupted"
    assert [path.name for path in (place.job / "tmp" / ".finetune.partial").glob(".checkpoint-*")]
    assert "PV-Tuning goes on after step" in place.run(on_b(place), UNJUDGED, "llm.AQLM.save_intermediate_results=false")
    assert weights(place) == weights(alone)
    tables = [each.manifest["stages"]["finetune"]["files"] for each in (place, alone)]
    assert tables[0] == tables[1], "nothing of the unfinished tuning is in it"
    assert not (place.job / "tmp").exists()


def listed(place: Place) -> Mapping[str, str]:
    from jobs.command_line.listing import list_jobs

    (entry,) = list_jobs(place.folder / "user_data")
    return entry.stages


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("llm.AQLM.finetune_config.lr=0.001", ["calibration", "finetune", "conversion"]),
        ("llm.AQLM.finetune_config=null", ["calibration", "conversion"]),
        ("llm.AQLM.finetune_config.max_epochs=0", ["calibration", "conversion"]),
    ],
)
def test_the_plan_lists_the_tuning_where_there_is_one(fresh, capsys, override, stages):
    arguments = ["--yaml_path", str(fresh.recipe), override]
    assert main.main(["validate", *arguments]) == 0
    assert "valid; AQLM" in capsys.readouterr().out
    assert main.main(["plan", *arguments]) == 0
    rows = re.findall(r"^(\w+) +run +not run yet", capsys.readouterr().out, re.MULTILINE)
    assert rows == stages
