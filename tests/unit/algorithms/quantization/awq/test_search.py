"""AWQ's search against every ratio tried with real forwards of a block."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from algorithms.blockwise.coded import FreshBlock
from algorithms.modeling.activations import embed
from algorithms.modeling.transforms.folding import feeder_rows, fold, shared
from algorithms.modeling.transforms.survey import ChannelStatistics
from algorithms.numerics.uniform import Grid
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.awq.search import ScaleSearch
from tests.support.models import FAMILIES, token_sequences
from tests.unit.algorithms.quantization.awq.planted import plain_and_planted

CPU = torch.device("cpu")
GROUP = 16
KINDS = {False: ("inputs",), True: ("duo",), "both": ("inputs", "duo")}


def _config(**changes):
    return AwqConfig.model_validate({"W_BIT": 3, "Q_GROUP_SIZE": GROUP, "search_steps": 2, "apply_clip": False, **changes})


def _fresh(source, index=1, count=6, **changes):
    (inputs,) = embed(source, [token_sequences(count, 16)], batch_size=2, device=CPU, offload=True)
    return FreshBlock(
        index=index,
        block=source.load_block(index),
        inputs=inputs,
        architecture=changes.pop("architecture", source.architecture),
    )


def _rounded(matrix):
    """Rounding to nearest by the book, minimum to maximum, in groups of ``GROUP``; float64."""
    tiles = matrix.reshape(matrix.shape[0], -1, GROUP)
    grid = Grid(bits=3, symmetric=False)
    scales, zeros = grid.full(tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0))
    scales, zeros = grid.stored(scales).double()[..., None], zeros.double()[..., None]
    codes = (tiles.double() / scales + zeros).round().clamp(0, 7)
    return (scales * (codes - zeros)).view_as(matrix)


def _inputs_of(fresh, leader):
    seen = []
    handle = fresh.block.get_submodule(leader).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].flatten(0, 1))
    )
    fresh.inputs.through(fresh.block, fresh.index)
    handle.remove()
    return torch.cat(seen).double()


def _candidates(fresh, group, kinds, steps):
    """Every factor that the search may try, by its label."""
    sizes = _inputs_of(fresh, group[0]).abs().mean(0)
    matrix = torch.cat([fresh.block.get_submodule(name).weight for name in group]).double()
    tiles = matrix.abs().view(matrix.shape[0], -1, GROUP)
    shares = (tiles / tiles.amax(-1, keepdim=True)).mean(0).flatten()
    made = {"none": torch.ones_like(sizes)}
    for kind in kinds:
        for ratio in (place / steps for place in range(steps + 1)):
            factors = sizes**ratio / (1.0 if kind == "inputs" else shares ** (1 - ratio) + 1e-4)
            factors = factors / (factors.max() * factors.min()).sqrt()
            if group[0] in fresh.architecture.feeders:
                factors = shared(factors, feeder_rows(fresh.block, fresh.architecture, group[0]))
            made[f"{kind} {ratio:g}"] = factors.float()
    return made


def _with_rounded(fresh, group, factors):
    block = copy.deepcopy(fresh.block)
    for name in group:
        linear = block.get_submodule(name)
        linear.weight.data = (_rounded(linear.weight * factors) / factors).float()
    return block


def _block_error(fresh, block):
    outputs = fresh.inputs.through(block, fresh.index).batches
    wanted = fresh.inputs.through(fresh.block, fresh.index).batches
    difference = torch.cat(outputs).double() - torch.cat(wanted)
    return (difference.square().sum() / torch.cat(wanted).double().square().sum()).item()


@pytest.mark.parametrize("duo", [False, "both"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_by_the_block_s_output_no_ratio_is_better(tmp_path, family, duo):
    _, source = plain_and_planted(tmp_path, family)
    fresh, searched = _fresh(source), _fresh(source)
    report = ScaleSearch(_config(objective="block_output", duo_scaling=duo)).prepare(searched)["scaling"]
    assert list(report) == [group[0] for group in fresh.architecture.input_groups]
    for group in fresh.architecture.input_groups:
        candidates = _candidates(fresh, group, KINDS[duo], 2)
        errors = {label: _block_error(fresh, _with_rounded(fresh, group, factors)) for label, factors in candidates.items()}
        found = report[group[0]]
        assert errors[found["factors"]] <= min(errors.values()) * 1.01
        assert found["error_share"] == pytest.approx(min(errors.values()) / errors["none"], rel=0.02)
        fold(fresh.block, fresh.architecture, group[0], candidates[found["factors"]])
    for name, parameter in searched.block.named_parameters():
        torch.testing.assert_close(parameter, fresh.block.get_parameter(name), rtol=2e-3, atol=1e-6)


def test_a_column_s_cost_adds_up_to_the_output_s_error_where_inputs_do_not_agree():
    """Tokens of one channel each: no products of two errors are left out, and the sum is the mean over tokens itself."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 32, generator=generator)
    tokens = torch.diag(torch.rand(32, generator=generator) * 4)
    hessian = tokens.T @ tokens / 32
    statistics = ChannelStatistics(hessian=hessian, mean_size=tokens.mean(0), largest=tokens.amax(0), sample=tokens)
    chosen = ScaleSearch(_config(gptq=False)).best([matrix[:16], matrix[16:]], statistics)

    def error(factors):
        difference = (_rounded(matrix * factors) / factors - matrix) @ tokens.T.double()
        return difference.square().sum(0).mean().item()

    assert chosen.plain_loss == pytest.approx(error(torch.ones(32)), rel=1e-5)
    assert chosen.loss == pytest.approx(error(chosen.candidate.scales), rel=1e-5)
    assert chosen.loss < chosen.plain_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_by_columns_it_is_about_as_good_as_the_best_ratio_on_real_tokens(tmp_path, family):
    _, source = plain_and_planted(tmp_path, family, hidden=64)
    fresh = _fresh(source)
    config = _config(gptq=False, search_steps=10)
    report = ScaleSearch(config).prepare(_fresh(source))["scaling"]
    for group in fresh.architecture.input_groups:
        tokens, candidates = _inputs_of(fresh, group[0]), _candidates(fresh, group, KINDS["both"], 10)
        matrix = torch.cat([fresh.block.get_submodule(name).weight for name in group])
        errors = {}
        for label, factors in candidates.items():
            errors[label] = ((_rounded(matrix * factors) / factors - matrix) @ tokens.T).square().mean().item()
        found = report[group[0]]
        # Products of errors in two channels average out over rows, of which there are few here.
        assert errors[found["factors"]] < 1.3 * min(errors.values())
        if group[0] in fresh.architecture.input_norms:
            assert errors[found["factors"]] < 1.1 * min(errors.values())
            assert errors[found["factors"]] < 0.7 * errors["none"]
            assert found["error_share"] == pytest.approx(errors[found["factors"]] / errors["none"], rel=0.2)
        fold(fresh.block, fresh.architecture, group[0], candidates[found["factors"]])


@pytest.mark.parametrize("objective", ["hessian", "block_output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_block_computes_what_it_did(tmp_path, family, objective):
    _, source = plain_and_planted(tmp_path, family, attention_bias=True)
    fresh = _fresh(source)
    before = torch.cat(fresh.inputs.through(fresh.block, 1).batches)
    kept = copy.deepcopy(fresh.block)
    ScaleSearch(_config(objective=objective)).prepare(fresh)
    torch.testing.assert_close(torch.cat(fresh.inputs.through(fresh.block, 1).batches), before, atol=2e-5, rtol=2e-4)
    weights = [block.get_submodule("mlp.gate_proj").weight for block in (kept, fresh.block)]
    assert not torch.allclose(*weights, rtol=0.1)


@pytest.mark.parametrize("objective", ["hessian", "block_output"])
def test_a_sequence_that_is_not_finite_is_as_good_as_absent(tmp_path, objective):
    _, source = plain_and_planted(tmp_path)
    broken, whole = _fresh(source), _fresh(source)
    broken.inputs.batches[0] = broken.inputs.batches[0].clone()
    broken.inputs.batches[0][1] = torch.nan
    batches = [whole.inputs.batches[0][:1], *whole.inputs.batches[1:]]
    whole = replace(whole, inputs=replace(whole.inputs, batches=batches))
    reports = [ScaleSearch(_config(objective=objective)).prepare(fresh)["scaling"] for fresh in (broken, whole)]
    for leader, figures in reports[1].items():
        assert reports[0][leader]["factors"] == figures["factors"]
        assert reports[0][leader]["error_share"] == pytest.approx(figures["error_share"], rel=1e-3)


def test_a_group_that_nothing_takes_factors_for_is_left_alone_and_named_once(tmp_path, caplog):
    _, source = plain_and_planted(tmp_path)
    architecture = replace(source.architecture, feeders={"mlp.down_proj": "mlp.up_proj"})
    search = ScaleSearch(_config())
    with caplog.at_level(logging.INFO):
        for index in range(2):
            fresh = replace(_fresh(source, index), architecture=architecture)
            before = fresh.block.self_attn.o_proj.weight.clone()
            assert "self_attn.o_proj" not in search.prepare(fresh)["scaling"]
            assert torch.equal(fresh.block.self_attn.o_proj.weight, before)
    assert [record.getMessage() for record in caplog.records] == [
        "self_attn.o_proj: nothing before takes factors, so the input channels stay as they are"
    ]
