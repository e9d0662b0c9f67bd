"""Whole calibrations on several ranks, beside those of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE
from algorithms.quantization.aqlm import calibration as aqlm_calibration
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from algorithms.quantization.awq.algorithm import Awq
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig
from algorithms.quantization.spqr.algorithm import Spqr
from algorithms.quantization.spqr.config import SpqrConfig
from tests.support.models import save_family
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.plugin_runs import TEXT, blocks, calibrate

PLUGINS = {"awq": (Awq, AwqConfig), "gptq": (Gptq, GptqConfig), "rtn": (Rtn, RtnConfig), "spqr": (Spqr, SpqrConfig)}
TUNING = {"block_tuning": {"max_epochs": 2, "batch_size": 2}}
AQLM = {**TEXT, "num_codebooks": 2, "nbits_per_codebook": 4, "in_group_size": 4, "finetune_batch_size": 4}


def _algorithm(name, parameters):
    if name == "aqlm":
        settings = {**AQLM, "finetune_max_epochs": 0, **parameters}
        return Aqlm(AqlmConfig.model_validate({"calibration_config": settings, "finetune_config": None}))
    plugin, config = PLUGINS[name]
    group = {"Q_GROUP_SIZE" if name == "awq" else "groupsize": 16}
    return plugin(config.model_validate({**TEXT, **group, **parameters}))


def _calibrate(ranks, name, parameters, model, folder, least_weights=1 << 14):
    aqlm_calibration._LEAST_WEIGHTS = least_weights
    return calibrate(_algorithm(name, parameters), ModelSource(model), folder, ranks=ranks)


@pytest.fixture
def model(tmp_path):
    return save_family(tmp_path / "base", "llama", blocks=3)


def _both(size, name, parameters, model, folder, **options):
    """Artifacts of a calibration by one process and by several ranks."""
    one = _calibrate(ALONE, name, parameters, model, folder / "one")
    several = run_on_ranks(_calibrate, size, name, parameters, model, folder / "several", *options.values())
    assert several == several[:1] * size
    assert sorted(path.name for path in one.directory.iterdir()) == sorted(p.name for p in several[0].directory.iterdir())
    return one, several[0]


def _stored(artifact, index):
    return load_file(artifact.directory / f"{index}.safetensors")


def _share_of_equal(algorithm, one, other):
    """Of the weights that are compressed before a code that another order of sums has turned can move all that follow."""
    first, second = (algorithm.load(artifact).model.layers[0].self_attn.state_dict() for artifact in (one, other))
    same = [torch.isclose(first[name], second[name], rtol=1e-3, atol=1e-6) for name in first]
    return torch.cat([part.double().flatten() for part in same]).mean().item()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("awq", {}),
        ("awq", {"gptq": False, "ZERO_POINT": False}),
        ("awq", {"objective": "block_output", "search_steps": 4}),
        ("gptq", {}),
        ("gptq", {"static_groups": False, "targets": "compressed_prefix", "true_sequential": True}),
        ("spqr", {}),
        ("spqr", {"target_bits": 6.0}),
        ("spqr", {"outlier_threshold": None}),
    ],
)
def test_ranks_find_the_codes_of_one_process(tmp_path, model, name, parameters):
    one, two = _both(2, name, parameters, model, tmp_path)
    assert _share_of_equal(_algorithm(name, parameters), one, two) > 0.98
    for first, second in zip(blocks(one, "linears"), blocks(two, "linears"), strict=True):
        assert first.keys() == second.keys()
        for linear, figures in first.items():
            assert second[linear]["relative_error"] == pytest.approx(figures["relative_error"], rel=0.1)
    if "targets" not in parameters:
        assert blocks(two, "output_error") == pytest.approx(blocks(one, "output_error"), rel=0.05)


@pytest.mark.parametrize("least_weights", [1 << 14, 64])  # whole linears are shared out, or rows of those that are alone
def test_additive_codebooks_are_as_good(tmp_path, model, least_weights):
    one, two = _both(2, "aqlm", {}, model, tmp_path, least_weights=least_weights)
    for first, second in zip(blocks(one, "linears"), blocks(two, "linears"), strict=True):
        for linear, figures in first.items():
            assert second[linear]["relative_error"] == pytest.approx(figures["relative_error"], rel=0.1)
            assert second[linear]["bits_per_weight"] == figures["bits_per_weight"]


@pytest.mark.parametrize("name", ["aqlm", "awq", "gptq", "rtn", "spqr"])
def test_tuning_on_ranks_lowers_the_error_as_in_one_process(tmp_path, model, name):
    parameters = {"finetune_max_epochs": 2} if name == "aqlm" else TUNING
    one, two = _both(2, name, parameters, model, tmp_path)
    for first, second in zip(blocks(one, "tuning"), blocks(two, "tuning"), strict=True):
        assert len(first["validation_losses"]) == len(second["validation_losses"])
    for first, second in zip(blocks(one, "output_error"), blocks(two, "output_error"), strict=True):
        assert second == pytest.approx(first, rel=0.25)


@pytest.mark.parametrize("objective", ["hessian", "block_output"])
def test_factors_are_searched_on_ranks_without_a_sequence_too(tmp_path, model, objective):
    parameters = {"nsamples": 2, "val_size": 0, "objective": objective, "search_steps": 2, "duo_scaling": False}
    one, three = _both(3, "awq", parameters, model, tmp_path)
    for first, second in zip(blocks(one, "scaling"), blocks(three, "scaling"), strict=True):
        assert first.keys() == second.keys()
    chosen, shared = blocks(one, "scaling")[0], blocks(three, "scaling")[0]  # later blocks have other inputs
    for leader, figures in chosen.items():
        assert shared[leader]["factors"] == figures["factors"]
        assert shared[leader]["error_share"] == pytest.approx(figures["error_share"], rel=1e-3)


@pytest.mark.parametrize("targets", ["original", "compressed_prefix"])
def test_ranks_without_a_sequence_take_part(tmp_path, model, targets):
    parameters = {"nsamples": 3, "val_size": 1, "finetune_max_epochs": 1, "targets": targets}
    one, three = _both(3, "aqlm", parameters, model, tmp_path)
    for first, second in zip(blocks(one, "tuning"), blocks(three, "tuning"), strict=True):
        assert len(first["training_losses"]) == len(second["training_losses"]) == 1
    assert blocks(three, "output_error") == pytest.approx(blocks(one, "output_error"), rel=0.25)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_resumes_a_calibration(tmp_path, model, before, after):
    def run(size):
        if size == 1:
            return _calibrate(ALONE, "gptq", TUNING, model, tmp_path / "job")
        return run_on_ranks(_calibrate, size, "gptq", TUNING, model, tmp_path / "job")[0]

    whole = run(before)
    kept, reports = [_stored(whole, index) for index in range(3)], blocks(whole, "output_error")
    for name in ("2.json", "2.safetensors", "calibration.json"):
        (whole.directory / name).unlink()
    (whole.directory / "1.safetensors").write_bytes(b"damaged")
    resumed = run(after)
    assert all(torch.equal(_stored(resumed, 0)[name], tensor) for name, tensor in kept[0].items())
    assert blocks(resumed, "output_error")[0] == reports[0]
    assert blocks(resumed, "output_error")[1:] == pytest.approx(reports[1:], rel=0.25)
    assert json.loads((resumed.directory / "calibration.json").read_text())["bits"] == _algorithm("gptq", TUNING).bits(resumed)


@pytest.mark.parametrize("name", ["aqlm", "awq", "gptq", "spqr", "rtn"])
def test_calibrations_with_text_run_on_all_ranks(name):
    calibration, conversion = _algorithm(name, {} if name == "aqlm" else TUNING).stages()
    assert (calibration.distributed, conversion.distributed) == (True, False)
    assert not _algorithm("rtn", {}).stages()[0].distributed
