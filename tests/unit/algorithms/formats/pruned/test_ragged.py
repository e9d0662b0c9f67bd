import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from algorithms.formats.client import load, main
from algorithms.formats.pruned import ragged
from algorithms.formats.pruned.ragged import MODELING, load_shipped, read_ragged, write_ragged
from algorithms.modeling.source import ModelError
from tests.support.models import FAMILIES, save_family
from tests.unit.algorithms.formats.pruned.pruned_models import COMPENSATION, TOKENS, pruned_model, settings_of

RESOURCE = Path(ragged.__file__).with_name(MODELING)
MARK = "\nfrom pathlib import Path\n\nPath({!r}).write_text('ran')\n"


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_ragged(pruned_model(tmp_path, "qwen2", biased=COMPENSATION).calibrated, out)
    return out


def change(folder, **settings):
    (folder / "config.json").write_text(json.dumps({**settings_of(folder), **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration(tmp_path, family):
    write_ragged(pruned_model(tmp_path, family, biased=COMPENSATION).calibrated, tmp_path)
    settings, original = settings_of(tmp_path), settings_of(tmp_path / "origin")
    own = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"} if family == "qwen2" else {}
    name = f"Ragged{family.capitalize()}"
    expected = {
        "model_type": f"ragged_{family}",
        "base_model_type": family,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"modeling_ragged.{name}Config",
            "AutoModelForCausalLM": f"modeling_ragged.{name}ForCausalLM",
        },
        "head_dim": 4,
        "num_attention_heads_per_layer": [4, 6, 2],
        "num_key_value_heads_per_layer": [2, 3, 1],
        "intermediate_size_per_layer": [29, 53, 3],
        "biases": sorted({*COMPENSATION, *own.values()}),
    }
    assert {key: settings[key] for key in expected} == expected
    changed = {key for key in original if settings[key] != original[key]}
    assert changed <= {"model_type", "architectures", "dtype", "torch_dtype"}


def test_transformers_asks_for_trust_and_says_what_for(folder):
    """In a process of its own: once a process has trusted the classes, it knows them."""
    program = (
        "import sys; from transformers import AutoConfig\n"
        "try: AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "except ValueError as error: sys.stdout.write(str(error))"
    )
    said = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True).stdout
    assert "contains custom code which must be executed to correctly load the model" in said
    assert "trust_remote_code=True" in said


def test_a_stranger_loads_it_without_this_project(folder, tmp_path):
    program = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'algorithms' not in sys.modules\n"
        "tokens = load_file(sys.argv[2])['tokens']\n"
        "save_file({'logits': model(tokens).logits.detach()}, sys.argv[3])"
    )
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    arguments = [str(folder), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, check=True, capture_output=True)
    theirs, ours = load_file(tmp_path / "logits")["logits"], read_ragged(folder)(TOKENS).logits
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_a_loaded_model_can_be_saved_and_loaded_again(folder, tmp_path):
    model = load_shipped(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_shipped(tmp_path / "again")(TOKENS).logits, model(TOKENS).logits)


def test_the_modelling_file_needs_torch_and_transformers_alone():
    tree = ast.parse(RESOURCE.read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert found == {"torch", "transformers"}


def test_other_code_under_the_same_name_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / MODELING).write_text(RESOURCE.read_text() + MARK.format(str(ran)))
    with pytest.raises(ModelError, match=r"modeling_ragged\.py is not the modelling file of this release; its code is not run"):
        load("ragged", folder)
    (folder / MODELING).unlink()
    with pytest.raises(ModelError, match="is not the modelling file of this release"):
        load("ragged", folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoConfig": "other.Config", "AutoModelForCausalLM": "modeling_ragged.RaggedQwen2ForCausalLM"}},
        {"auto_map": {"AutoModelForCausalLM": "someone/model--modeling_ragged.RaggedQwen2ForCausalLM"}},
        {"auto_map": None},
        {"model_type": "qwen2"},
        {"architectures": ["Qwen2ForCausalLM"]},
    ],
)
def test_a_configuration_that_names_other_code_is_refused(folder, tmp_path, settings):
    ran = tmp_path / "ran"
    (folder / "other.py").write_text(RESOURCE.read_text() + MARK.format(str(ran)))
    change(folder, **settings)
    with pytest.raises(ModelError, match=rf"code other than modeling_ragged\.py \({next(iter(settings))}\); it is not run"):
        load("ragged", folder)
    assert not ran.exists()


def test_nothing_else_in_the_folder_is_run(folder, tmp_path):
    """transformers runs this file of a folder that it trusts when it loads a model."""
    ran = tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model):\n    return None\n" + MARK.format(str(ran)))
    expected = read_ragged(folder)(TOKENS).logits
    assert torch.allclose(load("ragged", folder)(TOKENS).logits, expected, atol=1e-5)
    assert not ran.exists()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize("place", ["own", "absent"])
def test_our_reader_runs_no_code(folder, tmp_path, place):
    expected = load("ragged", folder)(TOKENS).logits
    ran = tmp_path / "ran"
    if place == "own":
        (folder / MODELING).write_text(MARK.format(str(ran)))
    else:
        (folder / MODELING).unlink()
    assert torch.allclose(read_ragged(folder)(TOKENS).logits, expected, atol=1e-5)
    assert not ran.exists()


def test_other_folders_are_refused(tmp_path):
    folder = save_family(tmp_path / "m", "llama")
    for read in (read_ragged, load_shipped):
        with pytest.raises(ModelError, match="has no base_model_type that is one of llama, mistral"):
            read(folder)


def test_the_client_program_reads_it(folder, tmp_path):
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    assert main(["ragged", str(folder), str(tmp_path / "tokens"), str(tmp_path / "answer")]) == 0
    answer = load_file(tmp_path / "answer")
    assert torch.allclose(answer["logits"], read_ragged(folder)(TOKENS).logits, atol=1e-5)
    assert answer["greedy"].shape == (2, 16)


def test_shards_are_read_too(folder, tmp_path):
    load_shipped(folder).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = read_ragged(folder)(TOKENS).logits
    for read in (read_ragged, load_shipped):
        assert torch.allclose(read(tmp_path / "shards")(TOKENS).logits, expected, atol=1e-5)
