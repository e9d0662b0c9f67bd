import itertools

import pytest
import torch

from algorithms.numerics.pruning.selection import STRUCTURES, BlockScores, Budget, select


def _blocks(seed, count=4, groups=8, neurons=96):
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(count):
        scores = [torch.rand(number, generator=generator) for number in (groups, neurons)]
        common = [torch.randn(number, generator=generator) for number in (groups, neurons)]
        blocks.append(BlockScores(groups=scores[0], neurons=scores[1], common_groups=common[0], common_neurons=common[1]))
    return blocks


def _left(selection, budget):
    return sum(budget.cost(len(one.groups), len(one.neurons)) for one in selection)


def _total(blocks, budget):
    return sum(budget.cost(len(block.groups), len(block.neurons)) for block in blocks)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("group_cost", [3, 20, 40])  # a neuron costs 3, so attention has 1 %, 36 % or 53 % of the parameters
@pytest.mark.parametrize("removed", [0, 8, 20])
def test_the_number_of_parameters_is_met(structure, ratio, group_cost, removed):
    blocks, budget = _blocks(1), Budget(ratio=ratio, group_cost=group_cost, neuron_cost=3, removed_groups=removed)
    selection, total = select(structure, blocks, budget), _total(blocks, budget)
    assert abs(_left(selection, budget) - (1 - ratio) * total) <= 0.005 * total
    for one in selection:
        assert one.groups
        assert one.neurons
        assert one.groups == tuple(sorted(set(one.groups)))
        assert one.neurons == tuple(sorted(set(one.neurons)))
    if structure.startswith("UL"):
        assert len({(len(one.groups), len(one.neurons)) for one in selection}) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_ratio_of_zero_keeps_everything(structure):
    blocks, budget = _blocks(2), Budget(ratio=0.0, group_cost=13, neuron_cost=3, removed_groups=6)
    for one in select(structure, blocks, budget):
        assert one.groups == tuple(range(8))
        assert one.neurons == tuple(range(96))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_of_each_stays_however_little_is_to_be_left(structure, caplog):
    blocks, budget = _blocks(3), Budget(ratio=0.999, group_cost=13, neuron_cost=3, removed_groups=28)
    for one in select(structure, blocks, budget):
        assert (len(one.groups), len(one.neurons)) == (1, 1)
    assert "4.1% of the weights stay instead of 0.1%" in caplog.text


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_is_said_of_a_ratio_that_is_met(structure, caplog):
    select(structure, _blocks(3), Budget(ratio=0.3, group_cost=13, neuron_cost=3, removed_groups=8))
    assert not caplog.records


def test_uniform_shares_and_matched_numbers():
    blocks = _blocks(4)
    for one in select("UL-UM", blocks, Budget(ratio=0.25, group_cost=12, neuron_cost=1)):
        assert (len(one.groups), len(one.neurons)) == (6, 72)
    for one in select("UL-MM", blocks, Budget(ratio=0.25, group_cost=12, neuron_cost=1, removed_groups=4)):
        assert (len(one.groups), len(one.neurons)) == (7, 60)  # 144 of 192 stay, 84 of them in groups
    separate = select("AL-MM", blocks, Budget(ratio=0.25, group_cost=12, neuron_cost=1, removed_groups=5))
    assert sum(len(one.groups) for one in separate) == 27
    assert sum(len(one.neurons) for one in separate) == 576 - 27 * 12


def test_uniform_keeps_the_best_of_each_block():
    blocks = _blocks(5)
    for block, one in zip(blocks, select("UL-UM", blocks, Budget(ratio=0.5, group_cost=12, neuron_cost=1)), strict=True):
        for scores, kept in ((block.groups, one.groups), (block.neurons, one.neurons)):
            dropped = [place for place in range(len(scores)) if place not in kept]
            assert scores[list(kept)].min() > scores[dropped].max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removed", [0, 2, 5])
def test_separate_keeps_the_largest_sum_of_scores_of_any_choice(seed, removed):
    blocks = _blocks(seed, count=2, groups=4, neurons=5)
    # Standing between blocks follows the scores within them, as it does for real scores: the best of a block is its best.
    blocks = [BlockScores(groups=b.common_groups, neurons=b.common_neurons, **_common(b)) for b in blocks]
    budget = Budget(ratio=0.5, group_cost=1, neuron_cost=1, removed_groups=removed)
    kept = select("AL-MM", blocks, budget)
    for scores, chosen in (
        ([b.common_groups for b in blocks], [one.groups for one in kept]),
        ([b.common_neurons for b in blocks], [one.neurons for one in kept]),
    ):
        places = [(index, place) for index, one in enumerate(scores) for place in range(len(one))]
        number = sum(len(one) for one in chosen)
        sums = [
            sum(scores[index][place].item() for index, place in some)
            for some in itertools.combinations(places, number)
            if {index for index, _ in some} == {0, 1}
        ]
        found = sum(one[list(some)].sum().item() for one, some in zip(scores, chosen, strict=True))
        assert found == pytest.approx(max(sums), abs=1e-5)


def _common(block):
    return {"common_groups": block.common_groups, "common_neurons": block.common_neurons}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_adaptive_keeps_what_the_lowest_threshold_keeps_that_fits(seed, ratio):
    blocks = _blocks(seed, groups=6, neurons=40)
    budget = Budget(ratio=ratio, group_cost=11, neuron_cost=3)
    found = [{("g", g) for g in one.groups} | {("n", n) for n in one.neurons} for one in select("AL-AM", blocks, budget)]

    def kept_above(threshold):
        return [
            {("g", place) for place, s in enumerate(b.common_groups.tolist()) if s > threshold}
            | {("n", place) for place, s in enumerate(b.common_neurons.tolist()) if s > threshold}
            | {("g", int(b.groups.argmax())), ("n", int(b.neurons.argmax()))}
            for b in blocks
        ]

    def cost(kept):
        return sum(11 if kind == "g" else 3 for one in kept for kind, _ in one)

    thresholds = torch.cat([torch.cat([b.common_groups, b.common_neurons]) for b in blocks]).tolist()
    fitting = max((kept_above(t) for t in thresholds if cost(kept_above(t)) <= budget.left(blocks)), key=cost)
    assert all(fewer <= more for fewer, more in zip(fitting, found, strict=True))
    # What is left over is less than a group and filled with neurons alone.
    extra = [kind for fewer, more in zip(fitting, found, strict=True) for kind, _ in more - fewer]
    assert set(extra) <= {"n"}
    assert 3 * len(extra) <= 11
    assert budget.left(blocks) - 3 < cost(found) <= budget.left(blocks)


def test_adaptive_gives_neurons_for_a_group_where_all_neurons_would_stay():
    blocks = [
        BlockScores(
            groups=torch.tensor([2.0, 1.0]),
            neurons=torch.tensor([5.0, 4.0, 3.0]),
            common_groups=torch.tensor([2.0, 1.0]),
            common_neurons=torch.tensor([5.0, 4.0, 3.0]),
        )
    ] * 2
    # Of 52 parameters 41 are to stay. All neurons and two groups are 32: a third group stays, and the worst neuron goes.
    kept = select("AL-AM", blocks, Budget(ratio=0.22, group_cost=10, neuron_cost=2))
    assert sum(len(one.groups) for one in kept) == 3
    assert [len(one.neurons) for one in kept].count(2) == 1
    assert all(2 not in one.neurons for one in kept if len(one.neurons) == 2)


def test_groups_and_neurons_of_all_blocks_compete():
    blocks = _blocks(6)
    best = max(range(4), key=lambda index: blocks[index].common_neurons.mean())
    raised = [
        BlockScores(groups=b.groups, neurons=b.neurons, common_groups=b.common_groups, common_neurons=b.common_neurons + 9)
        if index == best
        else b
        for index, b in enumerate(blocks)
    ]
    kept = select("AL-AM", raised, Budget(ratio=0.6, group_cost=13, neuron_cost=3))
    assert len(kept[best].neurons) == 96
    assert all(len(one.neurons) < 60 for index, one in enumerate(kept) if index != best)
