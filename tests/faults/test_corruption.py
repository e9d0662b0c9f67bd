"""One byte of every kind of file of a finished job is flipped; models come damaged from the start; two runs meet."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from jobs.manifest import ManifestFile
from tests.faults.kill import job_of, result
from tests.faults.warm_process import ROOT

MODEL = ROOT / "examples" / "quickstart" / "model"
STAGES = ["calibration", "finetune", "conversion"]
# Files of a finished job that are damaged together, and the stages that are made again for them; none of the rest is touched.
PUBLISHED = ["model.safetensors", "config.json", "tokenizer.json"]
PUBLISHED += ["exports/dense/model.safetensors", "exports/dense/config.json"]
DAMAGES = {
    "published": (PUBLISHED, []),
    "certificate": (["certificate.json"], []),
    "conversion": ([f"tmp/converted/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json")], STAGES[2:]),
    "finetune": ([f"tmp/finetune/{name}" for name in ("0.safetensors", "tuning.json", "tokenizer.json")], STAGES[1:]),
    "finetune's tokenizer": (["tmp/finetune/tokenizer.json"], STAGES[1:]),
    "calibration": (
        [f"tmp/calibration/{name}" for name in ("1.safetensors", "2.json", "not_quantized_weights.safetensors")],
        STAGES,
    ),
}


def flip(path: Path, at: float = 0.5) -> None:
    """Exchange one bit of a file, without touching another name of the same file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.unlink()
    path.write_bytes(bytes(content))


def times(job: Path) -> dict[str, str]:
    """When each stage of a job was finished, and of which attempt."""
    stages = json.loads((job / "manifest.json").read_text())["stages"]
    return {name: f"{stage['finished']} {stage['attempts']} {stage['wall_s']}" for name, stage in stages.items()}


@pytest.mark.parametrize("where", DAMAGES)
def test_a_flipped_byte_is_found_and_named_and_only_what_follows_is_made_again(run, finished, expected, where):
    job, (names, again) = job_of(finished), DAMAGES[where]
    before = times(job)
    for name in names:
        flip(job / name)
    if where.startswith("finetune"):  # or it would not be read: what was made from it is there
        shutil.rmtree(job / "tmp" / "converted")
        (job / "config.json").unlink()
    if where == "calibration":
        shutil.rmtree(job / "tmp" / "finetune")
        (job / "tmp" / "converted" / "config.json").unlink()
    done = run(finished)
    assert done.code == 0, done.said
    shown = [name.split("/", 2)[2] if name.startswith("tmp/") else name for name in names]
    assert [name for name in shown if name not in done.said] == [], done.said
    assert result(finished) == expected
    assert [stage for stage in before if before[stage] != times(job)[stage]] == again


@pytest.mark.parametrize("name", ["0.safetensors", "not_quantized_weights.safetensors", "config.json"])
def test_what_the_export_was_made_of_is_no_witness_against_it_once_it_is_damaged(run, finished, expected, name):
    job = job_of(finished)
    ManifestFile(job / "manifest.json").update(certificate=None, evaluation=None)
    flip(job / "tmp" / "finetune" / name)
    done = run(finished)
    assert done.code == 0, done.said[-3000:]
    assert f"tmp/finetune is damaged, and is done without: {name} has other content than was written" in done.said
    whole = {file: digest for file, digest in expected.items() if not file.startswith("tmp/finetune")}
    assert whole.items() <= result(finished).items()


def test_a_flipped_byte_of_an_earlier_result_is_found_by_whoever_starts_from_it(run, finished):
    flip(job_of(finished) / "exports" / "dense" / "model.safetensors")
    short = ["STAGES=[calibration]", "EVALUATION=null"]
    done = run(finished, "JOB_ID=second", "MODEL=job://faults/exports/dense", *short)
    assert done.code == 2, done.said[-3000:]
    assert "model.safetensors has other content than was written" in done.said.strip().splitlines()[-1]
    assert not list((finished / "jobs" / "Kompress" / "second").rglob("0.safetensors"))


@pytest.mark.parametrize("place", ["", "tmp/calibration", "exports/dense"])
def test_a_flipped_byte_is_found_by_whoever_scores_a_result(run_main, finished, place):
    folder = job_of(finished) / place
    flip(next(folder.glob("[0-9m]*.safetensors")))
    recipe = ["--yaml_path", str(ROOT / "tests" / "faults" / "recipe.yaml"), f"USER_FOLDER={finished}"]
    done = run_main("evaluate", *recipe, "--directory", str(folder))
    assert done.code == 2, done.said[-3000:]
    assert f"{folder} is damaged: " in done.said.strip().splitlines()[-1]


def test_a_flipped_byte_is_not_uploaded(run_main, finished):
    flip(job_of(finished) / "model.safetensors")
    recipe = ["--yaml_path", str(ROOT / "tests" / "faults" / "recipe.yaml"), f"USER_FOLDER={finished}"]
    done = run_main("push", *recipe, "PUSH_TO_HUB=a/b")
    assert done.code == 2, done.said[-3000:]
    assert "model.safetensors has other content than was written" in done.said.strip().splitlines()[-1]


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.97])
def test_a_flipped_byte_of_the_manifest_is_found_and_nothing_is_lost(run, finished, expected, at):
    job = job_of(finished)
    path, before = job / "manifest.json", times(job)
    flip(path, at=at)
    done = run(finished)
    assert done.code == 0, done.said
    assert f"{path} is damaged" in done.said
    assert result(finished) == expected
    assert times(job) == before
    assert f"{path} is damaged" not in run(finished).said  # it is written anew


def test_a_manifest_that_is_damaged_with_its_copy_is_named(run, finished):
    path = job_of(finished) / "manifest.json"
    flip(path, at=0.5)
    flip(path.with_name(".manifest.json.copy"), at=0.5)
    done = run(finished)
    assert done.code == 2
    assert str(path) in done.said
    assert "Traceback" not in done.said


@pytest.fixture
def model(tmp_path):
    """A copy of the model, as two shards."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    write_index(folder, {name: file for file, part in shards.items() for name in part})
    return folder


def write_index(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def assert_refused(run, tmp_path, model, *words, overrides=()):
    """The job ends with exit code 2 and all of the words, before it has compressed anything."""
    done = run(tmp_path / "user", f"MODEL={model}", *overrides)
    assert done.code == 2, done.said[-2000:]
    assert "Traceback" not in done.said
    assert [word for word in words if word not in done.said.strip().splitlines()[-1]] == [], done.said[-2000:]
    assert not list((tmp_path / "user").rglob("0.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_is_found_before_the_first_block(run, tmp_path, model, name, value):
    file = read_index(model)[name]
    tensors = load_file(model / file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / file, metadata={"format": "pt"})
    assert_refused(run, tmp_path, model, name, file, "NaN or infinity")


def test_a_sound_model_is_read_through_once(run, tmp_path, model):
    first, second = (run(tmp_path / "user", f"MODEL={model}", "STAGES=[calibration]", f"JOB_ID={name}") for name in "ab")
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert "checking weights 2/2" in first.said
    assert "checking weights" not in second.said


def test_a_weight_of_the_last_block_that_does_not_fit_is_found_before_the_first(run, tmp_path, model):
    name = "model.layers.3.mlp.down_proj.weight"
    file = read_index(model)[name]
    tensors = load_file(model / file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, model / file, metadata={"format": "pt"})
    assert_refused(run, tmp_path, model, name, file, "has the shape [128, 383]", "[128, 384]")


@pytest.mark.parametrize("values", [{"num_hidden_layers": 5}, {"hidden_act": "nope"}, {"rms_norm_eps": float("nan")}])
def test_a_configuration_that_does_not_fit_the_weights_is_found_before_the_first_block(run, tmp_path, model, values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))
    assert_refused(run, tmp_path, model, "MODEL: ")


def test_a_tokenizer_that_its_library_cannot_read_is_named(run, tmp_path, model):
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"] = {"type": "nobody knows"}
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert_refused(run, tmp_path, model, f"the tokenizer in {model} cannot be loaded")


def test_a_truncated_file_is_named(run, tmp_path, model):
    file = model / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(run, tmp_path, model, str(file), "truncated or damaged")


def test_an_index_that_names_missing_shards_says_which(run, tmp_path, model):
    (model / "model-2.safetensors").unlink()
    assert_refused(run, tmp_path, model, "model-2.safetensors", "missing")


@pytest.mark.parametrize("name", ["../model-2.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(run, tmp_path, model, name):
    shutil.copy(model / "model-2.safetensors", model.parent)
    write_index(model, {key: file.replace("model-2.safetensors", name) for key, file in read_index(model).items()})
    assert_refused(run, tmp_path, model, "outside its folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(run, tmp_path, model, text):
    (model / "model.safetensors.index.json").write_text(text)
    assert_refused(run, tmp_path, model, "model.safetensors.index.json", "damaged")


def test_a_tokenizer_with_more_words_than_the_model_has_is_found_before_the_first_block(run, tmp_path, model):
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"]["vocab"] = {word: number + 5000 for word, number in words["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert_refused(run, tmp_path, model, "its tokenizer gives ids up to", "vocabulary")


def test_a_second_run_says_who_has_the_job_and_ends(run, finished):
    program = (
        "import fcntl, json, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "json.dump({'host': 'here', 'pid': 4711, 'since': 'noon'}, f); f.flush(); sys.stdout.write('held'); sys.stdout.flush();"
        "time.sleep(60)"
    )
    lock = job_of(finished) / ".job.lock"
    other = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE)
    assert other.stdout.read(4) == b"held"
    try:
        done = run(finished)
        assert done.code == 2, done.said
        assert "process 4711 on here since noon" in done.said.strip().splitlines()[-1]
    finally:
        other.kill()
        other.wait()
    done = run(finished)
    assert done.code == 0, done.said
    assert "ended without a goodbye (process 4711 on here since noon); taking over" in done.said
