"""Models of families without a row, through whole jobs: calibrated, exported, and read by stock transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.plugins.test_codes_job import ENVIRONMENT, ROOT
from tests.support.families.strangers import save_stranger, stranger

EXAMPLES = {"RTN": "rtn_quantization", "GPTQ": "gptq_quantization", "AutoAWQ": "awq_quantization"}


def run(folder, algorithm, family):
    """The finished process and the job's folder."""
    model = save_stranger(folder / "model", family)
    name = EXAMPLES[algorithm]
    command = [sys.executable, "main.py", "--yaml_path", f"examples/text-generation/{name}/config.yaml"]
    command += [f"USER_FOLDER={folder}", f"MODEL={model}", "EXPORT=[dense]", "EVALUATION.max_tokens=512"]
    command += ["EVALUATION.sequence_length=64", "EVALUATION.perplexity=[wikitext2_excerpt]"]
    parameters = {
        "RTN": {"wbits": 4, "groupsize": 16},
        "GPTQ": {"groupsize": 16, "nsamples": 4, "model_seqlen": 32},
        "AutoAWQ": {"Q_GROUP_SIZE": 16, "nsamples": 4, "model_seqlen": 32},
    }[algorithm]
    command += [f"llm.{algorithm}.{key}={value}" for key, value in parameters.items()]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    return done, folder / "jobs" / "Kompress" / name


@pytest.mark.parametrize(
    ("algorithm", "family"), [("RTN", "stablelm"), ("GPTQ", "stablelm"), ("GPTQ", "glm"), ("AutoAWQ", "starcoder2")]
)
def test_a_family_without_a_row_is_compressed_and_served(tmp_path, algorithm, family):
    done, job = run(tmp_path, algorithm, family)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found by inspection" in done.stdout + done.stderr
    certificate = json.loads((job / "certificate.json").read_text())
    assert "passed" in json.dumps(certificate)
    model = AutoModelForCausalLM.from_pretrained(job, dtype=torch.float32)
    original = dict(stranger(family).named_parameters())
    changed = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, original[name].half().float()):
            changed.add(name.rpartition(".")[0].rpartition(".")[2])
            if algorithm == "RTN":  # a grid of at most 16 values a group
                assert max(len(run.unique()) for run in parameter.reshape(-1, 16)) <= 16
    expected = {
        "stablelm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "glm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
        "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    }
    assert changed == expected[family]
    assert set(load_file(job / "model.safetensors")) <= set(model.state_dict())
