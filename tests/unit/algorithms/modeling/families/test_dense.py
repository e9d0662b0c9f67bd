"""Rows of the architecture table against what transformers' own blocks do, seen by hooks."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from algorithms.modeling.activations import embed
from algorithms.modeling.families.table import ROWS
from algorithms.modeling.on_demand import source_on_demand
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.folding import can_fold, feeder_rows, fold, shared
from tests.support.families.cases import CASES, save_case
from tests.support.models import FAMILIES, save_family, token_sequences

CPU = torch.device("cpu")
ALL = (*FAMILIES, *CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a family or of a case, written when first asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            place = tmp_path_factory.mktemp(name) / "m"
            folders[name] = save_case(place, name, blocks=3) if name in CASES else save_family(place, name, blocks=3)
        return folders[name]

    return folder


def seen_in_block(folder, index):
    """By module of a stock model's block, in the order of their calls: inputs and outputs; and those of the block itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = ModelSource(folder)
    block = model.get_submodule(f"{source.architecture.blocks}.{index}")
    calls, passed = {}, []

    def note(name):
        def hook(module, args, output):
            calls[name] = args[0].flatten(0, -2), output.flatten(0, -2).clone()

        return hook

    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or "norm" in name or "ln_" in name:
            module.register_forward_hook(note(name))
    block.register_forward_hook(
        lambda module, args, output: passed.append((args[0], output[0] if isinstance(output, tuple) else output))
    )
    with torch.no_grad():
        model(torch.cat(token_sequences(2, 12)), use_cache=False)
    ((before, after),) = passed
    return block, calls, before.flatten(0, -2), after.flatten(0, -2)


@pytest.mark.parametrize("name", CASES)
def test_block_by_block_the_logits_are_those_of_transformers(saved, name):
    tokens = torch.cat(token_sequences(3, 14))
    expected = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32)(tokens).logits
    assert torch.equal(source_on_demand(ModelSource(saved(name)))(tokens).logits, expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_walking_the_blocks_gives_the_hidden_states_of_the_whole_model(saved, name):
    source = ModelSource(saved(name))
    (activations,) = embed(source, [token_sequences(3, 14)], batch_size=2, device=CPU, offload=True)
    for index in range(2):
        activations.advance(source.load_block(index), index)
    model = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32)
    seen = []
    hook = model.get_submodule(f"{source.architecture.blocks}.2").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    model(torch.cat(token_sequences(3, 14)), use_cache=False)
    hook.remove()
    torch.testing.assert_close(torch.cat(activations.batches), seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_groups_share_their_input_in_the_order_of_computation(saved, name, index):
    row = ModelSource(saved(name)).architecture
    block, calls, *_ = seen_in_block(saved(name), index)
    linears = [called for called in calls if isinstance(block.get_submodule(called), nn.Linear)]
    assert set(linears) == set(row.linears)
    groups: list[list[str]] = []  # of linears with one input, ordered by their first calls
    for linear in linears:
        same = [group for group in groups if torch.equal(calls[group[0]][0], calls[linear][0])]
        if same:
            same[0].append(linear)
        else:
            groups.append([linear])
    assert [set(group) for group in row.input_groups] == [set(group) for group in groups]
    assert [group[0] for group in row.input_groups] == [group[0] for group in groups]


@pytest.mark.parametrize("name", ALL)
def test_writers_are_what_is_added_to_the_residual_stream(saved, name):
    row = ModelSource(saved(name)).architecture
    _, calls, before, after = seen_in_block(saved(name), 1)
    last = row.residual_writers or [group[0] for group in row.input_groups][1::2]  # what would be, were there no norms behind
    factor = json.loads((saved(name) / "config.json").read_text()).get(row.residual_multiplier, 1.0)
    added = factor * sum(calls[writer][1] for writer in last)
    explained = torch.allclose(after - before, added, atol=1e-4, rtol=1e-4)
    assert explained == bool(row.residual_writers)


@pytest.mark.parametrize("name", ALL)
def test_norms_make_the_inputs_of_their_groups(saved, name):
    row = ModelSource(saved(name)).architecture
    _, calls, *_ = seen_in_block(saved(name), 1)
    for leader, norm in row.input_norms.items():
        assert torch.equal(calls[norm][1], calls[leader][0])
        reading = [other for other, (given, _) in calls.items() if torch.equal(given, calls[norm][1])]
        assert set(reading) == set(next(group for group in row.input_groups if group[0] == leader))


@pytest.mark.parametrize("name", CASES)
def test_folding_leaves_the_block_as_it_was(saved, name):
    source = ModelSource(saved(name))
    row = source.architecture
    (inputs,) = embed(source, [token_sequences(2, 12)], batch_size=2, device=CPU, offload=True)
    block = source.load_block(1)
    before, original = inputs.through(block, 1).batches[0], copy.deepcopy(block)
    leaders = [group[0] for group in row.input_groups if can_fold(row, group[0])]
    assert set(leaders) == {*row.input_norms, *row.feeders}
    for seed, leader in enumerate(leaders):
        columns = block.get_submodule(leader).weight.shape[1]
        factors = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) * 4 + 0.25
        if leader in row.feeders:
            factors = shared(factors, feeder_rows(block, row, leader))
        fold(block, row, leader, factors)
        assert not torch.allclose(block.get_submodule(leader).weight, original.get_submodule(leader).weight, rtol=0.05)
    torch.testing.assert_close(inputs.through(block, 1).batches[0], before, atol=1e-4, rtol=1e-3)


def test_every_dense_row_is_among_them(saved):
    met = [ModelSource(saved(name)).architecture for name in ALL]
    assert [(row.model_type, row.when) for row in ROWS if row.experts is None and row not in met] == []
