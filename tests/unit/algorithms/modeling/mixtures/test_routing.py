import pytest
import torch
from transformers import AutoModelForCausalLM

from algorithms.modeling.activations import embed
from algorithms.modeling.group_walk import GroupWalk
from algorithms.modeling.mixtures.experts import Experts
from algorithms.modeling.mixtures.routing import Routing, count_routed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.survey import whole_survey
from algorithms.parallel.ranks import ALONE
from tests.support.families.cases import MIXTURES, save_case
from tests.support.models import token_sequences

FAMILY = "mixtral"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ModelSource(save_case(tmp_path_factory.mktemp(FAMILY), FAMILY))


def _inputs(source):
    sequences = token_sequences(6, 16)
    (inputs,) = embed(source, [sequences], batch_size=2, device=torch.device("cpu"), offload=True)
    return inputs


def _reference(folder, sequences):
    """Inputs of block 0's experts and the experts of every token, as transformers' own router gives them."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0].double(), args[1])))
    with torch.no_grad():
        for tokens in sequences:
            model(tokens)
    return torch.cat([hidden for hidden, _ in seen]), torch.cat([chosen for _, chosen in seen])


def _walked(source, floor):
    inputs, found = _inputs(source), {}
    walk = GroupWalk(
        source.architecture,
        0,
        block=source.load_block(0, late_experts=True),
        original=source.load_block(0),
        current=inputs,
        reference=None,
        min_expert_tokens=floor,
    )
    with walk:
        for group in walk.groups:
            found[group[0]] = walk.statistics(group)
        outputs = list(walk.outputs())
    return walk.routing, found, outputs


@pytest.mark.parametrize("floor", [1, 48, 1000])
def test_an_expert_sees_its_own_tokens_or_all_where_they_are_few(source, floor):
    hidden, chosen = _reference(source.directory, token_sequences(6, 16))
    routing, found, outputs = _walked(source, floor)
    counts = [int((chosen == number).any(1).sum()) for number in range(4)]
    assert list(routing.tokens) == counts
    assert min(counts) < 48 < max(counts)
    for number, count in enumerate(counts):
        tokens = hidden if count < floor else hidden[(chosen == number).any(1)]
        statistics = found[f"mlp.experts.{number}.gate_proj"]
        assert statistics.num_tokens == found[f"mlp.experts.{number}.down_proj"].num_tokens == len(tokens)
        torch.testing.assert_close(statistics.hessian().double(), tokens.T @ tokens / len(tokens), atol=1e-5, rtol=1e-5)
    assert routing.starved == {number for number, count in enumerate(counts) if count < floor}
    # What the block computes is not touched by what its experts see.
    expected = _inputs(source).through(source.load_block(0), 0).batches
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-6)


def test_a_survey_sees_the_same(source):
    _, found, _ = _walked(source, None)
    block = source.load_block(0, late_experts=True)
    surveyed = whole_survey(block, 0, _inputs(source), source.architecture)
    assert surveyed.keys() == found.keys()
    for leader, statistics in surveyed.items():
        assert torch.equal(statistics.hessian, found[leader].hessian())
    assert not any(module.everywhere for module in block.modules() if isinstance(module, Experts))


@pytest.mark.parametrize(
    ("tokens", "floor", "expected"),
    [
        ([[0, 1]] * 40, None, 5),  # 80 choices over 4 experts: a quarter of 20
        ([[0, 1]] * 4000, None, 32),  # no more than there are input features
        ([[0, 1]], None, 1),
        ([[0, 1]] * 40, 7, 7),
        ([[4, 4]] * 3, None, 1),  # sent nowhere
    ],
)
def test_the_floor_follows_the_mean(source, tokens, floor, expected):
    experts = source.load_block(0).mlp.experts
    routing = count_routed(experts, [torch.tensor(tokens)], ALONE, floor)
    assert routing.floor == expected
    assert sum(routing.tokens) == sum(number < 4 for token in tokens for number in token)


def test_the_report_names_those_that_saw_all_tokens():
    routing = Routing(tokens=(5, 0, 9), floor=6)
    assert routing.report() == {"tokens": [5, 0, 9], "floor": 6, "calibrated_on_all_tokens": [0, 1]}


@pytest.mark.parametrize("family", MIXTURES)
def test_groups_share_their_input_in_the_order_of_computation(tmp_path, family):
    """Against hooks in the model as it computes: linears that are called with one tensor, in order."""
    source = ModelSource(save_case(tmp_path, family))
    for index in (0, 1):
        block, calls = source.load_block(index), []
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name, calls=calls: calls.append((name, args[0])))
        inputs = _inputs(source)
        inputs.arguments.run(block, index, torch.randn(4, 16, 32))
        seen = []
        for name, tensor in calls:
            if name.endswith("shared_expert_gate"):
                continue
            if seen and seen[-1][1] is tensor:
                seen[-1][0].append(name)
            else:
                seen.append(([name], tensor))
        assert [tuple(names) for names, _ in seen] == list(source.architecture.groups_in(block))
