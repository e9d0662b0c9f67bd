"""Whole calibrations of mixtures of experts."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from algorithms.quantization.awq.algorithm import Awq
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig
from algorithms.quantization.reallm.algorithm import Reallm
from algorithms.quantization.reallm.config import ReallmConfig
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig
from algorithms.quantization.spqr.algorithm import Spqr
from algorithms.quantization.spqr.config import SpqrConfig
from tests.support.families.cases import MIXTURES, save_case
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.plugin_runs import (
    assert_resumes,
    base_logits,
    blocks,
    calibrate,
    export_folder,
    logits,
    run,
)

TEXT = {"nsamples": 12, "model_seqlen": 16, "val_size": 2}
CODES = {**TEXT, "wbits": 8, "groupsize": 16}
# Of what the context says: a token that goes to another expert than before moves far, and these models are small.
CLOSE = {"gptq": 0.05, "awq": 0.05, "rtn": 0.05, "spqr": 0.3, "reallm": 0.4, "aqlm": 0.5}
ADDITIVE = {**TEXT, "num_codebooks": 2, "nbits_per_codebook": 5, "in_group_size": 4}


def _algorithm(name, **changes):
    match name:
        case "gptq":
            return Gptq(GptqConfig.model_validate({**CODES, **changes}), exports=("dense",))
        case "awq":
            keys = {**TEXT, "W_BIT": 8, "Q_GROUP_SIZE": 16, **changes}
            return Awq(AwqConfig.model_validate(keys), exports=("dense",))
        case "rtn":
            return Rtn(RtnConfig.model_validate({"wbits": 8, "groupsize": 16, **changes}), exports=("dense",))
        case "spqr":
            return Spqr(SpqrConfig.model_validate({**CODES, "wbits": 4, **changes}), exports=("dense",))
        case "reallm":
            keys = {**TEXT, "rank": 2, "num_bits": 3, "block_tuning": None, **changes}
            return Reallm(ReallmConfig.model_validate(keys), exports=("dense",))
        case "aqlm":
            keys = {"finetune_max_epochs": 0, **ADDITIVE, **changes}
            return Aqlm(AqlmConfig.model_validate({"calibration_config": keys, "finetune_config": None}), exports=("dense",))
    raise ValueError(name)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return ModelSource(save_case(tmp_path_factory.mktemp("mixtral"), "mixtral", blocks=3))


def _divergence(found, wanted):
    return (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean().item()


def _signal(wanted):
    """What a model that knows nothing of the context is away: a measure to compare divergences with."""
    return _divergence(wanted.log_softmax(-1).mean((0, 1)).expand_as(wanted), wanted)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["gptq", "awq", "aqlm", "rtn"])
def test_what_stock_transformers_loads_is_what_was_calibrated_and_close(tmp_path, family, name):
    source = ModelSource(save_case(tmp_path / "base", family))
    algorithm = _algorithm(name)
    calibrated, *_, converted = run(algorithm, source, tmp_path)
    folder = export_folder(converted, algorithm, "dense")
    expected = logits(algorithm.load(calibrated))
    stock = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    torch.testing.assert_close(stock, logits(algorithm.load(converted)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stock, expected, atol=0.02, rtol=0)  # rounded to float16 on the way
    names = {name for name in load_file(folder / "model.safetensors") if name.startswith("model.layers")}
    assert names == {name for name in source.stored_files if name.startswith("model.layers")}
    base = base_logits(source)
    assert _divergence(expected, base) < CLOSE[name] * _signal(base)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gptq", {}),
        ("gptq", {"block_tuning": {"max_epochs": 2}}),
        ("gptq", {"targets": "compressed_prefix"}),
        ("gptq", {"targets": "compressed_prefix", "true_sequential": True}),
        ("awq", {"objective": "block_output", "search_steps": 3}),
        ("spqr", {}),
        ("reallm", {}),
        ("reallm", {"target_bits": 9.0}),
        ("aqlm", {"finetune_max_epochs": 2}),
    ],
)
def test_every_way_to_calibrate_takes_a_mixture(tmp_path, mixtral, name, changes):
    algorithm = _algorithm(name, **changes)
    calibrated = run(algorithm, mixtral, tmp_path)[-2]
    base = base_logits(mixtral)
    assert _divergence(logits(algorithm.load(calibrated)), base) < CLOSE[name] * _signal(base)


@pytest.mark.parametrize("name", ["gptq", "aqlm"])
def test_a_killed_calibration_goes_on(tmp_path, mixtral, name):
    assert_resumes(_algorithm(name), mixtral, tmp_path)


def _calibrate(ranks, name, changes, model, folder):
    return calibrate(_algorithm(name, **changes), ModelSource(model), folder, ranks=ranks)


@pytest.mark.parametrize("name", ["gptq", "awq", "aqlm"])
def test_ranks_route_and_fit_as_one_process_does(tmp_path, mixtral, name):
    one = _calibrate(ALONE, name, {}, mixtral.directory, tmp_path / "one")
    several = run_on_ranks(_calibrate, 2, name, {}, mixtral.directory, tmp_path / "several")
    assert several == several[:1] * 2
    assert blocks(several[0], "experts")[0] == blocks(one, "experts")[0]
    base, algorithm = base_logits(mixtral), _algorithm(name)
    for artifact in (one, several[0]):
        assert _divergence(logits(algorithm.load(artifact)), base) < CLOSE[name] * _signal(base)


def test_starved_experts_are_reported_and_fitted_to_all_tokens(tmp_path, mixtral, caplog):
    found = {}
    for floor in (1, 10_000):
        calibrated = calibrate(_algorithm("gptq", min_expert_tokens=floor), mixtral, tmp_path / str(floor))
        found[floor] = load_file(calibrated.directory / "0.safetensors")
        (report, *_) = blocks(calibrated, "experts")
        assert report["floor"] == floor
        assert sum(report["tokens"]) == 2 * 10 * 16  # two experts a token
        assert report["calibrated_on_all_tokens"] == ([] if floor == 1 else [0, 1, 2, 3])
    assert "block 0: experts that are given fewer than 10000 tokens are calibrated on all: 0 (" in caplog.text
    assert "more" not in caplog.text
    differing = {name for name in found[1] if not torch.equal(found[1][name], found[10_000][name])}
    assert differing
    assert all(".experts." in name for name in differing)


def test_statistics_of_experts_are_worth_their_while(tmp_path):
    source = ModelSource(save_case(tmp_path / "base", "mixtral"))
    base, left = base_logits(source), {}
    for name, changes in (("rtn", {}), ("gptq", {"nsamples": 66})):
        algorithm = _algorithm(name, wbits=4, **changes)
        left[name] = _divergence(logits(algorithm.load(calibrate(algorithm, source, tmp_path / name))), base)
    assert left["gptq"] < 0.8 * left["rtn"]


def test_late_experts_and_those_in_memory_give_the_same(tmp_path, mixtral, monkeypatch):
    late = calibrate(_algorithm("gptq"), mixtral, tmp_path / "late")
    load = ModelSource.load_block
    monkeypatch.setattr(ModelSource, "load_block", lambda self, index, *, late_experts=False, **how: load(self, index, **how))
    whole = calibrate(_algorithm("gptq"), mixtral, tmp_path / "whole")
    for index in range(3):
        first, second = (load_file(at.directory / f"{index}.safetensors") for at in (late, whole))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_warning_of_many_starved_experts_names_those_with_fewest_tokens(tmp_path, caplog):
    source = ModelSource(save_case(tmp_path / "m", "mixtral", blocks=1, num_local_experts=12))
    calibrated = calibrate(_algorithm("gptq", min_expert_tokens=10_000), source, tmp_path / "out")
    (report,) = blocks(calibrated, "experts")
    fewest = sorted(range(12), key=lambda number: (report["tokens"][number], number))[:8]
    listed = ", ".join(f"{number} ({report['tokens'][number]})" for number in sorted(fewest))
    assert f"are calibrated on all: {listed} and 4 more" in caplog.text
