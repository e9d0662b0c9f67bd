import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from algorithms.base import Artifact, StageContext
from algorithms.modeling.source import ModelSource
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from tests.support.models import FAMILIES, save_family, token_sequences

CALIBRATION = {
    "nsamples": 8,
    "model_seqlen": 16,
    "val_size": 2,
    "num_codebooks": 2,
    "nbits_per_codebook": 4,
    "in_group_size": 4,
}


def _algorithm(exports=(), **changes):
    settings = {**CALIBRATION, "finetune_max_epochs": 2, "finetune_batch_size": 4, **changes}
    return Aqlm(AqlmConfig.model_validate({"calibration_config": settings, "finetune_config": None}), exports)


@contextlib.contextmanager
def _silent(description, total):
    yield lambda note: None


class _KilledError(Exception):
    pass


def _killed_at(block):
    @contextlib.contextmanager
    def progress(description, total):
        def advance(note):
            if note.startswith(f"block {block}"):
                raise _KilledError

        yield advance

    return progress


def _context(source, folder, *, progress=_silent):
    sequences = token_sequences(8, 16)
    return StageContext(
        source=source,
        tokens=sequences[2:],
        validation_tokens=sequences[:2],
        output_dir=folder,
        scratch_dir=folder.parent / "scratch",
        device=torch.device("cpu"),
        seed=0,
        metrics=lambda record: None,
        progress=progress,
    )


def _run(algorithm, source, folder):
    artifact = Artifact(kind="model", directory=source.directory, digest="base")
    artifacts = []
    for spec in algorithm.stages():
        directory = folder / spec.directory
        directory.mkdir(parents=True, exist_ok=True)
        artifact = spec.run(_context(source, directory), artifact)
        artifacts.append(artifact)
    return artifacts


def _logits(model):
    with torch.no_grad():
        return model(torch.cat(token_sequences(2, 20, seed=5))).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_converted_model_loads_with_its_client_and_computes_the_same(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "base", family, tied=tied))
    algorithm = _algorithm()
    calibrated, converted = _run(algorithm, source, tmp_path / "out")
    client = AutoModelForCausalLM.from_pretrained(converted.directory, dtype=torch.float32)
    replaced = [name for name, module in client.named_modules() if type(module).__name__ == "QuantizedLinear"]
    assert len(replaced) == 2 * len(source.architecture.linears)
    ours = _logits(algorithm.load(calibrated))
    torch.testing.assert_close(_logits(client), ours, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(_logits(algorithm.load(converted)), ours, atol=1e-6, rtol=1e-5)
    base = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    assert 0.0 < (ours - base).std() / base.std() < 0.7


def test_the_dense_export_is_the_same_model(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "qwen2"))
    algorithm = _algorithm(exports=("aqlm", "dense"))
    calibrated, converted = _run(algorithm, source, tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(converted.directory / "exports" / "dense", dtype=torch.float32)
    torch.testing.assert_close(_logits(dense), _logits(algorithm.load(calibrated)), atol=5e-3, rtol=5e-3)
    assert "quantization_config" not in json.loads((converted.directory / "exports" / "dense" / "config.json").read_text())


def test_tuning_lowers_the_error_of_every_block(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    calibrated, _ = _run(_algorithm(finetune_max_epochs=6), source, tmp_path / "out")
    for report in json.loads((calibrated.directory / "calibration.json").read_text())["blocks"]:
        losses, best = report["tuning"]["validation_losses"], report["tuning"]["best_epoch"]
        assert losses[best] == min(losses) < losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"finetune_max_epochs": 0},
        {"targets": "compressed_prefix"},
        {"targets": "compressed_prefix", "true_sequential": True},
        {"beam_size": 3},
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    algorithm = _algorithm(**changes)
    (whole, _), broken = _run(algorithm, source, tmp_path / "whole"), tmp_path / "broken"
    broken.mkdir()
    base = Artifact(kind="model", directory=source.directory, digest="base")
    with pytest.raises(_KilledError):
        algorithm.stages()[0].run(_context(source, broken, progress=_killed_at(2)), base)
    first = {name: (broken / name).stat().st_mtime_ns for name in ("0.safetensors", "1.safetensors")}
    assert not (broken / "2.safetensors").exists()
    algorithm.stages()[0].run(_context(source, broken), base)
    assert {name: (broken / name).stat().st_mtime_ns for name in first} == first
    for index in range(3):
        expected, found = (load_file(folder / f"{index}.safetensors") for folder in (whole.directory, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"attn_implementation": "eager"}, {"use_checkpointing": True}])
def test_what_saves_memory_costs_no_quality(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    plain, other = (
        _algorithm(max_epochs=1, **options).load(_run(_algorithm(max_epochs=1, **options), source, tmp_path / name)[0])
        for name, options in (("plain", {}), ("other", changes))
    )
    base = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    errors = [(_logits(model) - base).std() for model in (plain, other)]
    # Another rounding leads the search to other codes, whose error differs by a tenth or two; a mistake would multiply it.
    assert errors[1] < 1.5 * errors[0]


def test_bits_count_codes_codebooks_and_scales(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = _algorithm(finetune_max_epochs=0)
    calibrated, converted = _run(algorithm, source, tmp_path / "out")
    block = source.load_block(0)
    shapes = [tuple(block.get_submodule(name).weight.shape) for name in source.architecture.linears]
    weights = sum(rows * columns for rows, columns in shapes)
    expected = {
        "codes": 2 * weights * 2 * 4 / 4,
        "codebooks": 2 * len(shapes) * 2 * 16 * 4 * 16,
        "scales": 2 * 16 * sum(rows for rows, _ in shapes),
        "parameters": 2 * weights,
    }
    assert dict(algorithm.bits(calibrated)) == expected
    assert dict(algorithm.bits(converted)) == expected


def test_groups_that_do_not_divide_are_all_named(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=r"5 do not divide self_attn\.q_proj \[32, 32\].*mlp\.down_proj \[32, 64\]"):
        _algorithm(in_group_size=5).preflight(source, ["calibration", "conversion"])


def test_a_recipe_without_tuning_has_two_stages():
    tuning = Aqlm(AqlmConfig.model_validate({"calibration_config": CALIBRATION}))
    assert [spec.name for spec in tuning.stages()] == ["calibration", "finetune", "conversion"]
    for absent in (None, {"max_epochs": 0}):
        algorithm = Aqlm(AqlmConfig.model_validate({"calibration_config": CALIBRATION, "finetune_config": absent}))
        assert [spec.name for spec in algorithm.stages()] == ["calibration", "conversion"]


def test_keys_that_cannot_change_the_result_stay_out_of_the_settings():
    plain = _algorithm().stages()[0].settings
    assert _algorithm(local_batch_size=1, offload_activations=False, print_frequency=3).stages()[0].settings == plain
    assert _algorithm(beam_size=2).stages()[0].settings != plain
    assert all(field not in plain for field in ("num_samples", "sequence_length"))  # the tokens' key holds them


def test_every_shaping_key_is_a_field_of_the_config():
    from algorithms.quantization.aqlm.algorithm import _NOT_SHAPING
    from algorithms.quantization.aqlm.config import CalibrationConfig

    assert set(CalibrationConfig.model_fields) >= _NOT_SHAPING


MEASURE = """
import sys
from pathlib import Path
from tests.unit.algorithms.quantization.aqlm.test_plugin import peaks_by_block
print(*peaks_by_block(Path(sys.argv[1])))
"""


def peaks_by_block(folder):
    """Peak resident bytes of this process after each block of a calibration."""
    peaks = []

    @contextlib.contextmanager
    def progress(description, total):
        yield lambda note: peaks.append(_peak_resident())

    source = ModelSource(folder)
    algorithm = _algorithm(
        finetune_max_epochs=1, num_codebooks=1, nbits_per_codebook=2, max_epochs=1, init_max_iter=2, steps_per_epoch=1
    )
    out = folder / "out"
    out.mkdir()
    artifact = Artifact(kind="model", directory=folder, digest="base")
    algorithm.stages()[0].run(_context(source, out, progress=progress), artifact)
    return peaks


def _peak_resident():
    """Peak resident bytes of this process. Not getrusage's, which starts at what the parent had when it forked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    folder = save_family(tmp_path / "m", "llama", blocks=24, hidden=256)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    peaks = [int(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
    assert len(peaks) == 24
    one_block = sum(parameter.numel() * 4 for parameter in ModelSource(folder).load_block(0).parameters())
    # Holding on to the blocks would add twenty times one_block from the fourth to the last; an allocator adds a little.
    assert peaks[-1] - peaks[3] < 7 * one_block


def test_settings_are_plain_values():
    for spec in _algorithm().stages():
        json.dumps(dict(spec.settings))
        assert dataclasses.is_dataclass(spec)
