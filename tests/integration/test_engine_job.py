"""A job with TensorRT-LLM from the command line: without its programs, and with scripts that stand for them."""

import json
import logging
import shlex
from pathlib import Path

import pytest

from configs.errors import ExitCode
from main import main
from tests.unit.algorithms.engines.fake_programs import calls, install

EXAMPLE = Path("examples/text-generation/tensorrtllm_engine/config.yaml").resolve()
MODEL = Path("examples/quickstart/model").resolve()
BLOCK = "llm.TensorRTLLM"


def command(folder: Path, *words: str, name: str = "run") -> ExitCode:
    keys = (f"USER_FOLDER={folder / 'user_data'}", f"MODEL={MODEL}", f"{BLOCK}.examples_dir={folder / 'examples'}")
    return main([name, "--yaml_path", str(EXAMPLE), *keys, *words])


def job(folder: Path) -> Path:
    return folder / "user_data" / "jobs" / "Kompress" / "tensorrtllm_engine"


def manifest(folder: Path) -> dict:
    return json.loads((job(folder) / "manifest.json").read_text())


@pytest.fixture(autouse=True)
def bare_path(tmp_path, monkeypatch):
    """Nothing on the PATH but what a test installs."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


@pytest.mark.parametrize("words", [(), ("NUM_PROCESSES=2",)])
def test_without_the_programs_a_run_says_what_to_install_and_leaves_no_result(tmp_path, capsys, words):
    """In this very process: the programs use all devices by themselves, so no ranks are started."""
    assert command(tmp_path, *words) is ExitCode.ENVIRONMENT == 3
    said = capsys.readouterr().err
    assert "trtllm-build is not on the PATH; python is not on the PATH;" in said
    assert "pip install tensorrt_llm==0.9.0 --extra-index-url https://pypi.nvidia.com" in said
    assert manifest(tmp_path)["stages"] == {}


def test_plan_and_validate_need_no_programs(tmp_path, capsys):
    assert command(tmp_path, name="validate") is ExitCode.DONE
    assert command(tmp_path, 'CUDA_ID="0,1"', name="plan") is ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    quantize, build = (shlex.split(line) for line in lines[lines.index("commands") + 1 :])
    assert quantize[:2] == ["python", str(tmp_path / "examples/quantization/quantize.py")]
    assert quantize[2:4] == ["--model_dir", str(MODEL)]
    checkpoint = str(job(tmp_path) / "tllm_checkpoint_llama_int4_awq")
    assert quantize[quantize.index("--output_dir") + 1] == build[build.index("--checkpoint_dir") + 1] == checkpoint
    assert build[:3] == ["trtllm-build", "--output_dir", str(job(tmp_path))]
    assert quantize[quantize.index("--tp_size") + 1] == build[build.index("--tp_size") + 1] == "2"
    assert any("A run would be refused: trtllm-build is not on the PATH" in line for line in lines)
    assert not (tmp_path / "user_data").exists()


def test_a_whole_job_publishes_the_engines(tmp_path, capsys):
    install(tmp_path)
    assert command(tmp_path, f"{BLOCK}.gpus=2") is ExitCode.DONE
    summary = capsys.readouterr().out
    assert "certificate, tensorrt-llm" in summary
    assert "no client on this machine: no client for tensorrt-llm" in summary
    assert " -> 600 B (" in summary
    published = {path.name for path in job(tmp_path).iterdir() if path.is_file()}
    engine = {"rank0.engine", "rank1.engine", "config.json", "run.py", "utils.py", "build.log", "bits_report.json"}
    assert engine | {"README.md", "manifest.json", "certificate.json"} <= published
    assert "model.cache" not in published, "what a program leaves in its working folder is not part of the result"
    assert (job(tmp_path) / "tmp/checkpoint/tllm_checkpoint_llama_int4_awq/rank1.safetensors").is_file()
    parameters = manifest(tmp_path)["model"]["parameters"]
    assert manifest(tmp_path)["bits"]["bits"] == {"checkpoint": 8.0 * 400, "parameters": parameters}
    quantize, build = calls(tmp_path)
    assert [quantize[0], build[0]] == ["quantize.py", "trtllm-build"]
    assert quantize[quantize.index("--tp_size") + 1] == build[build.index("--tp_size") + 1] == "2"
    card = (job(tmp_path) / "README.md").read_text()
    assert f"python run.py --max_output_len 1000 --tokenizer_dir {MODEL} --engine_dir ." in card
    assert "AutoModelForCausalLM" not in card
    assert "library_name: tensorrt-llm" in card

    assert command(tmp_path, f"{BLOCK}.gpus=2") is ExitCode.DONE
    assert calls(tmp_path) == [], "finished stages are reused"
    assert command(tmp_path, f"{BLOCK}.gpus=2", f"{BLOCK}.max_batch_size=4") is ExitCode.DONE
    assert [name for name, *_ in calls(tmp_path)] == ["trtllm-build"], "another build starts from the same checkpoint"
    scored = (f"--directory={job(tmp_path)}", "EVALUATION.perplexity=[own]", *own(tmp_path))
    assert command(tmp_path, *scored, name="evaluate") is ExitCode.ENVIRONMENT, "no one here can run an engine"


def own(folder: Path) -> list[str]:
    """Overrides that name a text to evaluate on."""
    (folder / "own.txt").write_text("Some words to be read. " * 200)
    return [f"CORPORA.own={folder / 'own.txt'}", "EVALUATION.sequence_length=16", "EVALUATION.max_tokens=64"]


def test_a_program_that_fails_stops_the_job_at_once(tmp_path, capsys):
    install(tmp_path, failing=("quantize.py",))
    assert command(tmp_path) is ExitCode.RECIPE
    said, log = capsys.readouterr().err, job(tmp_path) / "tmp/.checkpoint.partial/checkpoint.log"
    assert "ended with exit code 7" in said
    assert "  quantize.py says hello" in said
    assert str(log) in said
    assert "quantize.py says hello" in log.read_text()
    assert [name for name, *_ in calls(tmp_path)] == ["quantize.py"], "nothing is built on a checkpoint that failed"
    install(tmp_path)
    assert command(tmp_path) is ExitCode.DONE
    assert (job(tmp_path) / "rank0.engine").stat().st_size == 300


def test_fewer_engines_than_gpus_are_no_result(tmp_path, capsys):
    """Release 1.0 reads the number of GPUs from the checkpoint; the scripts here do not, and build one engine."""
    install(tmp_path)
    assert command(tmp_path, f"{BLOCK}.gpus=2", f"{BLOCK}.release=1.0") is ExitCode.RECIPE
    assert "trtllm-build ended well and left no rank1.engine" in capsys.readouterr().err
    assert not (job(tmp_path) / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EVALUATION.perplexity=[own]"], "EVALUATION: what TensorRTLLM makes cannot be run by this program"),
        ([f"{BLOCK}.quant_method=smoothquant"], "smoothquant is not supported for mistral, which has int4_awq, fp8, int8"),
        (
            [f"{BLOCK}.to_quantize=false", f"{BLOCK}.rotary_base=5000"],
            "5000.0 is not the model's, which is 10000.0",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_program_runs(tmp_path, capsys, words, said):
    install(tmp_path)
    if "EVALUATION" not in words[0]:
        config = json.loads((MODEL / "config.json").read_text()) | {"model_type": "mistral"}
        mistral = tmp_path / "mistral"
        mistral.mkdir()
        (mistral / "config.json").write_text(json.dumps(config))
        (mistral / "model.safetensors").symlink_to(MODEL / "model.safetensors")
        words = [*words, f"MODEL={mistral}"]
    else:
        words = [*words, *own(tmp_path)]
    assert command(tmp_path, *words) is ExitCode.RECIPE
    assert said in capsys.readouterr().err
    assert calls(tmp_path) == []
    assert command(tmp_path, *words, name="plan") is ExitCode.DONE
    assert f"A run would be refused: {words[0].partition('.')[0]}" in capsys.readouterr().out
