"""Statistics of a block's channels against hooks and float64, alone and on ranks of which one has no text."""

import copy
from dataclasses import replace

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.survey import first_tokens, whole_survey
from tests.support.models import FAMILIES, save_family, token_sequences
from tests.support.rank_processes import run_on_ranks

CPU = torch.device("cpu")


def _inputs(source, count=5, length=9):
    return embed(source, [token_sequences(count, length)], batch_size=2, device=CPU, offload=True)[0]


def _seen(block, index, inputs, leaders):
    """All tokens that reach each leader, [n, I] float64."""
    seen = {leader: [] for leader in leaders}
    handles = [
        block.get_submodule(leader).register_forward_pre_hook(
            lambda _module, arguments, leader=leader: seen[leader].append(arguments[0].flatten(0, 1).double())
        )
        for leader in leaders
    ]
    inputs.through(block, index)
    for handle in handles:
        handle.remove()
    return {leader: torch.cat(tokens) for leader, tokens in seen.items()}


def _check(found, seen):
    assert list(found) == list(seen)
    for leader, statistics in found.items():
        tokens = seen[leader]
        torch.testing.assert_close(statistics.hessian.double(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.mean_size.double(), tokens.abs().mean(0), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(statistics.largest.double(), tokens.abs().amax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_all_tokens_and_the_block_stays_as_it_is(tmp_path, family):
    source = ModelSource(save_family(tmp_path, family))
    inputs, block = _inputs(source), source.load_block(1)
    leaders = [group[0] for group in source.architecture.input_groups]
    before = copy.deepcopy(block).state_dict()
    kept = [batch.clone() for batch in inputs.batches]
    _check(whole_survey(block, 1, inputs, source.architecture), _seen(block, 1, inputs, leaders))
    after = block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(*pair) for pair in zip(kept, inputs.batches, strict=True))


def _surveyed(ranks, folder):
    source = ModelSource(folder)
    inputs = _inputs(source)
    mine = replace(inputs, batches=inputs.batches[ranks.rank : ranks.rank + 1] if ranks.rank < 2 else [])
    return whole_survey(source.load_block(0), 0, mine, source.architecture, ranks)


def test_ranks_see_what_one_process_does(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    inputs, leaders = _inputs(source), [group[0] for group in source.architecture.input_groups]
    some = replace(inputs, batches=inputs.batches[:2])
    seen = _seen(source.load_block(0), 0, some, leaders)
    found = run_on_ranks(_surveyed, 3, tmp_path / "m")
    for part in found:
        _check(part, seen)
        assert all(torch.equal(part[leader].hessian, found[0][leader].hessian) for leader in leaders)


def test_tokens_that_are_not_finite_are_left_out(tmp_path):
    source = ModelSource(save_family(tmp_path, "llama"))
    inputs, block = _inputs(source), source.load_block(0)
    leaders = [group[0] for group in source.architecture.input_groups]
    broken = replace(inputs, batches=[batch.clone() for batch in inputs.batches])
    broken.batches[0][1, 4, 3] = torch.nan  # attention carries it to all later tokens of its sequence
    found = whole_survey(block, 0, broken, source.architecture)
    seen = _seen(block, 0, broken, leaders)
    finite = {leader: tokens[torch.isfinite(tokens).all(1)] for leader, tokens in seen.items()}
    assert len(finite["self_attn.q_proj"]) == 44
    assert len(finite["mlp.gate_proj"]) < 44
    _check(found, finite)


def test_without_a_finite_token_it_says_so(tmp_path):
    source = ModelSource(save_family(tmp_path, "llama"))
    inputs = _inputs(source)
    broken = replace(inputs, batches=[torch.full_like(batch, torch.inf) for batch in inputs.batches])
    with pytest.raises(ValueError, match="no finite activations"):
        whole_survey(source.load_block(0), 0, broken, source.architecture)


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (18, 1), (19, 2), (36, 2), (37, 3), (1000, 3)])
def test_the_first_batches_hold_so_many_tokens(tmp_path, count, batches):
    inputs = _inputs(ModelSource(save_family(tmp_path, "llama")))  # 18, 18 and 9 tokens
    found = first_tokens(inputs, count)
    assert len(found.batches) == batches
    assert all(one is other for one, other in zip(found.batches, inputs.batches, strict=False))
    assert first_tokens(replace(inputs, batches=[]), count).batches == []
